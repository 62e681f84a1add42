"""What the tests of formats share."""

from __future__ import annotations

import pytest
from transformers.utils import logging


@pytest.fixture(scope="module")
def quiet_transformers():
    """Turn off what transformers prints about unusual settings."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(level)
