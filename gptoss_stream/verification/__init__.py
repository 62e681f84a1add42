"""Checking a converted output.

Does: compare an output with what its source gives, byte for byte, or with its checksums.
May import: every room below it.
Must not know: what a conversion recorded, except format, dtype and selection as defaults.
"""
