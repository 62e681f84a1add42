"""Checkpoints as people have them, used without converting: the same tensors, the same refusals."""

from __future__ import annotations

import pytest
from field_converted import CONVERTED
from field_kinds import KINDS
from field_refused import REFUSED
from outputs import load_output, same_bits

import gptoss_stream


def rows(table: dict) -> list:
    return [pytest.param(row, id=name) for name, row in table.items()]


@pytest.mark.parametrize("case", rows(CONVERTED))
def test_the_tensors_are_those_that_are_converted(case, tmp_path):
    case.source.write(tmp_path / "source")
    for to in ("hf", "transformer-lens", "openai"):
        gptoss_stream.convert(tmp_path / "source", tmp_path / to, to=to)
        expected = load_output(tmp_path / to)
        with gptoss_stream.open_state_dict(tmp_path / "source", to=to) as state:
            assert {*state} == {*expected}
            differing = [
                name
                for name, tensor in expected.items()
                if not same_bits(state[name].contiguous(), tensor)
            ]
            assert differing == []


@pytest.mark.parametrize("case", rows({**REFUSED, **KINDS}))
def test_what_is_not_converted_is_refused(case, tmp_path):
    """With the same words, when it is opened."""
    case.source.write(tmp_path / "source")
    with pytest.raises(gptoss_stream.GptOssStreamError) as caught:
        gptoss_stream.open_state_dict(tmp_path / "source", to="hf")
    line = str(caught.value)
    assert [word for word in case.words if word not in line] == [], line
    assert [word for word in case.never if word in line] == [], line
