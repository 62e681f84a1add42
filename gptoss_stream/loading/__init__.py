"""Loading converted outputs.

Does: describe an output, open it as a state dict of mapped tensors or as a HookedTransformer.
May import: _utils, errors, tensors, model, storage, checkpoint, and of writing only run_state.
Must not know: how an output is planned, converted or written.
"""
