"""Writes shards on the workers of a Dask cluster.

Does: sends task specifications to workers, which plan again and write one shard each.
May import: errors, _utils, checkpoint, storage, planning, writing.
Must not know: formats, tensors, how a shard is written.
"""
