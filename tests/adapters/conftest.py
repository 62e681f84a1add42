"""Small models and adapters for them."""

from __future__ import annotations

import pytest
from adapter_cases import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Makes models, adapters and what merging them must give, each once per session."""
    return Made(tmp_path_factory.mktemp("adapters"))
