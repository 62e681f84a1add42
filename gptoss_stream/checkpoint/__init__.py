"""A checkpoint: its configuration, its tensors' descriptions, and reading their data.

Does: checks configuration files, index and headers; reads tensor data, local or remote.
May import: errors, _utils, tensors, storage.
Must not know: formats, what the tensors mean, what is written.
"""
