"""Examples of interpretability research on converted checkpoints, to run and to copy from.

Does: show how to use the public functions.
May import: the names of `gptoss_stream.__all__` and _utils, and packages of the extra `examples`.
Must not know: anything else of this package.
"""
