"""Writes shards on the workers of a Dask cluster.

Does: sends task specifications to workers, which plan again and write one shard each.
May import: errors, _utils, storage, checkpoint, formats, planning, writing.
Must not know: what formats store, how a shard is written.
"""
