"""Everything about an output that is known before its data is made.

Does: map tensors from one format to another, plan shards, refuse what cannot be converted.
May import: adapters, formats, model, transforms, checkpoint, storage, tensors, errors, _utils.
Must not know: how shards are written, and by which threads or machines.
"""
