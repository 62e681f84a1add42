"""Other programs run models off a checkpoint. Slow: each needs an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv

import pytest
from inference_runs import TOKENS, logits
from oracle import load_model, save_tokenizer
from runs import ROOT
from safetensors.torch import save_file
from torch import float32

import gptoss_stream

pytestmark = pytest.mark.slow

NEEDS = ["numpy", "einops", "tqdm", "threadpoolctl", "fsspec", "safetensors", "huggingface_hub"]
TOOLS = ["transformer-lens>=4,<5", "nnsight==0.8.*", "lm-eval==0.4.13"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that installs packages in an environment, and runs a script that prints JSON."""
    python = tmp_path_factory.mktemp("environment") / "bin/python"
    venv.create(python.parent.parent, with_pip=True)

    def run(packages, script, *arguments):
        install = [python, "-m", "pip", "install", "-q", "torch==2.13.0", *NEEDS, *packages]
        subprocess.run(install, check=True, stdout=sys.stderr)
        done = subprocess.run(
            [python, "-c", script, *arguments],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tiny checkpoint with a tokenizer, and the logits that transformers computes with it."""
    folder = gptoss_stream.synth(tmp_path_factory.mktemp("source") / "source")
    save_tokenizer(folder)
    expected = logits(load_model(folder, float32), TOKENS)
    save_file({"tokens": TOKENS, "logits": expected}, folder.parent / "expected.safetensors")
    return folder


START = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import gptoss_stream
from pathlib import Path
from safetensors.torch import load_file

stored = load_file(Path(sys.argv[1]).parent / "expected.safetensors")
tokens, expected = stored["tokens"], stored["logits"]
model = gptoss_stream.load_hf_model(sys.argv[1], dtype="float32")

def difference(found):
    return (found - expected).abs().max().item()
"""

BRIDGE = (
    START
    + """
from transformer_lens.model_bridge import TransformerBridge

with torch.no_grad():
    bridge = TransformerBridge.boot_transformers(sys.argv[1], hf_model=model, dtype=model.dtype)
    found, cache = bridge.run_with_cache(tokens)
    changed = bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: value * 2)])
print(json.dumps({
    "difference": difference(found),
    "changed": difference(changed),
    "hooks": sum(name.endswith("hook_resid_pre") for name in cache),
}))
"""
)


def test_a_transformer_bridge_is_booted_from_it(source, run):
    found = run(TOOLS, BRIDGE, source)
    assert found["difference"] < 1e-5
    assert found["changed"] > 1e-2
    assert found["hooks"] == 4


CONVERTED = """
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


@pytest.mark.parametrize("of", ["hf-mxfp4", "openai"])
def test_a_transformer_bridge_of_a_converted_folder(of, tmp_path, run):
    """It computes the logits of transformers' model."""
    folder = gptoss_stream.synth(tmp_path / "source", format=of)
    save_tokenizer(folder)
    gptoss_stream.convert(folder, tmp_path / "out", to="hf", dtype="float32")
    result = run(TOOLS, CONVERTED, tmp_path / "out")
    assert result["difference"] == 0
    assert result["spread"] > 0
    assert result["hooks"] == 4  # one for each layer


NNSIGHT = (
    START
    + """
from nnsight import NNsight

traced = NNsight(model)
with torch.no_grad(), traced.trace(tokens):
    experts = traced.model.layers[1].mlp.experts.output.save()
    found = traced.lm_head.output.save()
with torch.no_grad(), traced.trace(tokens):
    traced.model.layers[1].mlp.experts.output[:] = 0
    changed = traced.lm_head.output.save()
print(json.dumps({
    "difference": difference(found),
    "changed": difference(changed),
    "shape": list(experts.shape),
}))
"""
)


def test_nnsight_traces_it(source, run):
    found = run(TOOLS, NNSIGHT, source)
    assert found["difference"] < 1e-5
    assert found["changed"] > 1e-3
    assert found["shape"] == [120, 96]


LM_EVAL = (
    START
    + """
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
texts = [(" ".join(f"w{t}" for t in row[:50]), "".join(f" w{t}" for t in row[50:]))
         for row in (tokens + 2).tolist()]
requests = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
found = [value for value, _ in evaluated.loglikelihood(requests)]
with torch.no_grad():
    values = model(tokens + 2).logits.log_softmax(-1)[:, 49:59].gather(-1, tokens[:, 50:, None] + 2)
print(json.dumps({"found": found, "expected": values.sum((1, 2)).tolist()}))
"""
)


def test_lm_eval_scores_texts_with_it(source, run):
    found = run(TOOLS, LM_EVAL, source)
    assert found["found"] == pytest.approx(found["expected"], abs=1e-3)
    assert found["found"][0] < -1


LOGITS = (
    START
    + """
with torch.no_grad():
    asked = model(tokens, output_hidden_states=True, output_attentions=True,
                  output_router_logits=True)
    texts = [model.generate(tokens[:, :12], attention_mask=torch.ones(2, 12), do_sample=False,
                            max_new_tokens=12, eos_token_id=None, use_cache=use_cache).tolist()
             for use_cache in (True, False)]
print(json.dumps({
    "difference": difference(asked.logits),
    "layers": [len(asked.hidden_states), len(asked.attentions), len(asked.router_logits)],
    "same texts": texts[0] == texts[1],
}))
"""
)


@pytest.mark.parametrize("version", ["5.0.0", "5.5.0", "5.10.0", "5.17.0", "5.24.0"])
def test_the_range_of_transformers(version, source, run):
    """With each version the logits are those of the version that is installed here."""
    found = run([f"transformers=={version}"], LOGITS, source)
    assert found["difference"] < 1e-5
    assert found["layers"] == [5, 4, 4]
    assert found["same texts"]


def test_a_version_that_is_too_old_is_refused(source, run):
    script = """
import json, sys
import gptoss_stream
try: gptoss_stream.load_hf_model(sys.argv[1])
except gptoss_stream.MissingPackageError as error: print(json.dumps(str(error)))
"""
    assert "transformers 4.57.6 is too old" in run(["transformers==4.57.6"], script, source)
