"""Random models in each format."""

from __future__ import annotations

import independent
import pytest
from format_pairs import VARIANTS


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A function from a format and a variant to the folder of a random model, and the model."""
    written = {}

    def source(name, variant):
        if (name, variant) not in written:
            dtype, settings = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("source")
            written[name, variant] = independent.write_source(name, folder, dtype, **settings)
        return written[name, variant]

    return source
