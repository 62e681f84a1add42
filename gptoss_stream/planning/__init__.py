"""Plans a conversion: every shard, tensor, shape and size, before any data is moved.

Does: maps one format's table to another's, and lays the output tensors into shards.
May import: errors, _utils, tensors, storage, checkpoint, transforms, model, formats.
Must not know: threads, output files, how data is read or written.
"""
