"""The examples run on a checkpoint, converted or not, and measure it correctly."""

from __future__ import annotations

import subprocess
import sys

import oracle
import pytest
import torch
from runs import ROOT

import gptoss_stream
from gptoss_stream.examples import experts_and_lens


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    gptoss_stream.convert(checkpoints(), out, dtype="float32")
    return out


def test_a_picture_is_drawn(checkpoints, tmp_path):
    """By the command of the README, in a process of its own."""
    picture = tmp_path / "picture.png"
    module = "gptoss_stream.examples.experts_and_lens"
    done = subprocess.run(
        [sys.executable, "-m", module, checkpoints(), picture],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000
    assert len(done.stdout.splitlines()) == 5  # four layers and the picture
    assert "the logit lens agrees at 100% of the positions" in done.stdout.splitlines()[3]


@torch.no_grad()
def test_the_measurements_equal_those_of_the_hugging_face_model(checkpoints):
    tokens = torch.arange(50)[None] * 25 % 1009
    model = gptoss_stream.load_hooked_transformer(checkpoints(), dtype="float32")
    usage, agreement = experts_and_lens.measure(model, tokens)
    peer = oracle.load_model(checkpoints(), torch.float32)
    counted = []
    for layer in peer.model.layers:
        layer.mlp.router.register_forward_hook(
            lambda module, inputs, output: counted.append(
                torch.bincount(output[-1].flatten(), minlength=5) / (50 * 2)
            )
        )
    states = peer(tokens, output_hidden_states=True)
    assert torch.allclose(usage, torch.stack(counted))
    assert usage.sum(-1).allclose(torch.ones(4))
    final = states.logits.argmax(-1)
    for layer, state in enumerate(states.hidden_states[1:-1]):
        chosen = peer.lm_head(peer.model.norm(state)).argmax(-1)
        assert agreement[layer] == (chosen == final).float().mean()
    assert agreement[-1] == 1


def test_an_error_is_one_line(converted, tmp_path, capsys):
    assert experts_and_lens.main([str(converted), str(tmp_path / "x.none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert experts_and_lens.main([str(tmp_path), str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
