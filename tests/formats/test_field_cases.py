"""Checkpoints as people have them: each is converted bit for bit, or refused with the true reason.

They stand for public reports, made anew with random numbers. What is right is known without the
package: the tensors are those that the checkpoint was made of, and where transformers loads the
checkpoint itself, it computes the same from the output.
"""

from __future__ import annotations

import json

import oracle
import pytest
import torch
from field_cases import Converted
from field_converted import CONVERTED
from field_kinds import KINDS
from field_refused import REFUSED
from outputs import load_output, same_bits
from runs import assert_clean_error, run_in_process
from transformers import AutoModelForCausalLM

import gptoss_stream

NEVER_WRITTEN = {"auto_map", "quantization", "quantization_config", "transformers_weights"}


def rows(table: dict) -> list:
    return [pytest.param(row, id=name) for name, row in table.items()]


def differing(found: dict, expected: dict) -> list[str]:
    """Return the names of tensors that are in one of two models only, or have other bits."""
    return [
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or not same_bits(found[name], expected[name])
    ]


def expected_tensors(case: Converted, model: dict) -> dict:
    """Return what the output must have: the model, where a head is left out as the embedding."""
    return {name: tensor for name, tensor in model.items() if name not in case.without}


@pytest.mark.parametrize("case", rows(CONVERTED))
def test_a_checkpoint_is_converted(case, tmp_path):
    model = case.source.write(tmp_path / "source")
    done = run_in_process("convert", tmp_path / "source", tmp_path / "out", "--to", "hf")
    assert done.returncode == 0, done.stderr
    found = load_output(tmp_path / "out")
    if "lm_head.weight" in case.without and "lm_head.weight" in found:
        # As good as none: it is the embedding.
        model = {**model, "lm_head.weight": model["model.embed_tokens.weight"]}
        assert differing(found, model) == []
    else:
        assert differing(found, expected_tensors(case, model)) == []
    for words in case.notes:
        assert words in done.stderr, done.stderr
    assert all(line.startswith("gptoss_stream: warning: ") for line in done.stderr.splitlines())
    text = json.loads((tmp_path / "out/config.json").read_text())
    assert case.config.items() <= text.items()
    assert not [key for key in text if key in NEVER_WRITTEN or key.startswith("unsloth")]
    assert len(gptoss_stream.plan(tmp_path / "source").unmapped) == case.unmapped
    assert gptoss_stream.verify(tmp_path / "source", tmp_path / "out").equal
    if case.same_as_transformers:
        assert_same_logits(tmp_path / "source", tmp_path / "out", case.source.mxfp4)


def assert_same_logits(source, output, mxfp4: bool) -> None:
    """Assert that transformers computes the same from the source, loaded whole, as from the
    output."""
    tokens = torch.arange(30)[None] * 11 % 67
    original = oracle.load_model(source) if mxfp4 else whole(source)
    with torch.no_grad():
        found, expected = whole(output)(tokens).logits, original(tokens).logits
    assert found.std() > 0
    assert torch.equal(found, expected)


def whole(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("case", rows({**REFUSED, **KINDS}))
def test_a_checkpoint_is_refused(case, tmp_path):
    """In one line that says why, and what does not mislead. Nothing is written."""
    case.source.write(tmp_path / "source")
    done = run_in_process("convert", tmp_path / "source", tmp_path / "out", "--to", "hf")
    assert_clean_error(done, 2)
    assert [word for word in case.words if word not in done.stderr] == [], done.stderr
    assert [word for word in case.never if word in done.stderr] == [], done.stderr
    assert not (tmp_path / "out").exists()
