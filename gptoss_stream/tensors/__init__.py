"""Dtypes, casts, MXFP4 and the safetensors header.

Does: describes and converts arrays and bytes.
May import: errors, _utils.
Must not know: files, checkpoints, gpt-oss.
"""
