"""The gpt-oss model, whichever format stores it.

Does: describe a model by its configuration, name its tensors and their axes, select among them.
May import: tensors, errors, _utils.
Must not know: formats, stored names, checkpoints and their files.
"""
