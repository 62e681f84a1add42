"""Helpers that have nothing to do with checkpoints.

Does: strict JSON, memory limits, texts of messages, regular files, buffers and threads.
May import: errors.
Must not know: checkpoints, formats, tensors, where files are.
"""
