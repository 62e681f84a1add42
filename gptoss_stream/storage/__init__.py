"""Where files are: local folders, repositories of the Hub, object stores and HTTP servers.

Does: lists files, reads byte ranges of them, and writes files, with retries and checks; keeps
    blocks of remote files on disk.
May import: errors, _utils.
Must not know: what a checkpoint is.
"""
