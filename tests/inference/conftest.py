"""Checkpoints to run, the models that run them, and transformers' own models to compare with."""

from __future__ import annotations

import oracle
import pytest
import torch

import gptoss_stream

LOADERS = ["load_hf_model", "load_hooked_transformer"]


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Tiny products take one thread; more would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LOADERS)
def load(request):
    """Each function that loads a model."""
    return getattr(gptoss_stream, request.param)


@pytest.fixture(scope="session")
def expected(checkpoints):
    """A function from a folder and a dtype to transformers' model, which dequantises itself; by
    default of the tiny checkpoint."""
    models = {}

    def model(folder=None, dtype="float32"):
        folder = folder or checkpoints()
        if (folder, dtype) not in models:
            made = oracle.load_model(folder, getattr(torch, dtype)).eval()
            made.config._experts_implementation = "eager"  # others add experts in another order
            models[folder, dtype] = made.requires_grad_(False)
        return models[folder, dtype]

    return model
