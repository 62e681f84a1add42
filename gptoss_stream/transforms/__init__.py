"""From stored elements to the bytes of an output tensor.

Does: load stored elements, rearrange and cast them, make any byte range of an output tensor.
May import: checkpoint, tensors, errors, _utils.
Must not know: formats, what tensors are called, shards and files of the output.
"""
