"""Single tensors of a checkpoint, without converting it.

Does: describe an output, open a checkpoint as a state dict whose tensors are mapped or made.
May import: _utils, errors, tensors, storage, checkpoint, transforms, formats, adapters, planning,
    and of writing only run_state.
Must not know: how an output is written, or how a model runs.
"""
