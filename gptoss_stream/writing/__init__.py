"""Writes outputs: shards, the files beside them, and the state that lets a run resume.

Does: writes planned shards, local or remote, so that nothing unfinished looks finished.
May import: errors, _utils, tensors, storage, checkpoint, transforms, planning.
Must not know: formats, the names of tensors, Dask.
"""
