"""Small models and adapters for them."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Makes models, adapters and what merging them must give, each once per session."""
    return Made(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Let torch use one thread: for tensors this small, others would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
