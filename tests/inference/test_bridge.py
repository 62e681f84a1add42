"""TransformerLens 4 on the format `hf`. Slow: it needs an environment, as 3.9 is installed here."""

from __future__ import annotations

import json
import subprocess
import sys
import venv

import pytest
from oracle import save_tokenizer

import gptoss_stream

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

tokens = torch.arange(40)[None] * 25 % 1009
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
bridge = TransformerBridge.boot_transformers(sys.argv[1], dtype=model.dtype)
with torch.no_grad():
    expected, (found, cache) = model(tokens).logits, bridge.run_with_cache(tokens)
print(json.dumps({
    "difference": (found - expected).abs().max().item(),
    "spread": expected.std().item(),
    "hooks": sum(name.endswith("hook_resid_pre") for name in cache),
}))
"""


@pytest.mark.parametrize("source", ["hf-mxfp4", "openai"])
def test_a_transformer_bridge_computes_the_hugging_face_logits(source, tmp_path, environment):
    folder = gptoss_stream.synth(tmp_path / "source", format=source)
    save_tokenizer(folder)
    gptoss_stream.convert(folder, tmp_path / "out", to="hf", dtype="float32")
    done = subprocess.run(
        [environment, "-c", SCRIPT, tmp_path / "out"],
        env={"HF_HUB_OFFLINE": "1", "PATH": ""},
        stdout=subprocess.PIPE,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["difference"] == 0
    assert result["spread"] > 0
    assert result["hooks"] == 4  # one for each layer


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python with transformer-lens 4."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    packages = ["torch==2.13.0", "transformer-lens>=4,<5"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, stdout=sys.stderr)
    return python
