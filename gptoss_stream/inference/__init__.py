"""Models that run straight off a checkpoint, without converting it.

Does: build a HookedTransformer or transformers' GptOssForCausalLM whose dense weights are mapped
    and whose experts are decoded when they are used.
May import: _utils, errors, tensors, model, storage, checkpoint, transforms, formats, adapters,
    planning, loading.
Must not know: how a tensor is made, or how an output is written.
"""
