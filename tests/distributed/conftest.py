"""A checkpoint, its conversion by one process, and a Dask cluster."""

from __future__ import annotations

import pytest
from clusters import cluster
from runs import convert_command, digests, run


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints(layers=3)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The checksums of an output that one process wrote."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(convert_command(source, output, "--checksums")).returncode == 0
    return digests(output)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cluster of two workers. No test may end them."""
    with cluster(tmp_path_factory.mktemp("cluster"), 2) as running:
        yield running
