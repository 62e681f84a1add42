"""The command line, one file per command.

Does: parse arguments, call the library, print results, map errors to exit codes.
May import: everything, but numpy, torch, einops and tqdm only when a command runs.
Must not know: how anything is read, converted or written.
"""
