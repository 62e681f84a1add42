"""What several tests of writing convert."""

from __future__ import annotations

import pytest
from runs import Conversion


@pytest.fixture(scope="module")
def large(checkpoints, tmp_path_factory) -> Conversion:
    """A conversion that spends most of its time writing shards, three at once."""
    source = checkpoints(layers=4, experts=5, hidden_size=352, intermediate_size=288)
    output = tmp_path_factory.mktemp("large") / "out"
    return Conversion.done(source, output, "--workers=3", "--max-shard-size=3MB")
