"""Checking a converted output, or any checkpoint.

Does: compare an output with what its source gives, byte for byte, or with its checksums; compare a
    few values of a checkpoint with those of another one.
May import: every room below it.
Must not know: what a conversion recorded, except format, dtype and selection as defaults.
"""
