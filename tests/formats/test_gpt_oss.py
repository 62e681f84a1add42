"""OpenAI's own package loads the format `openai`.

Slow: the package needs an environment of its own, since its metadata requires Python 3.12 and many
packages that its model does not use.
"""

from __future__ import annotations

import subprocess
import sys
import venv

import independent
import oracle
import pytest
import torch
from outputs import same_bits
from safetensors.torch import load_file

import gptoss_stream

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
from gpt_oss.torch.model import Transformer
from gpt_oss.torch.weights import Checkpoint
from safetensors.torch import save_file

source, output = sys.argv[1:]
with torch.inference_mode():
    model = Transformer.from_checkpoint(source, "cpu")
    tensors = {f"weights.{name}": tensor.data.clone() for name, tensor in model.named_parameters()}
    tokens = torch.arange(40, dtype=torch.int32) * 25 % 101
    save_file({"logits": model.float()(tokens).clone(), **tensors}, output)
"""


@pytest.mark.parametrize("source", ["hf-mxfp4", "openai"])
def test_openais_own_model_computes_the_hugging_face_logits(source, tmp_path, environment):
    folder, model = independent.write_source(source, tmp_path / "source", torch.bfloat16)
    gptoss_stream.convert(folder, tmp_path / "out", to="openai")
    command = [environment, "-c", SCRIPT, tmp_path / "out", tmp_path / "found"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = load_file(tmp_path / "found")
    logits = found.pop("logits")
    mxfp4 = independent.load_folder(tmp_path / "source/hf")
    whole = independent.to_openai(independent.dequantised(mxfp4), 2)
    renamed = {"gate_up_proj": "mlp1_weight", "down_proj": "mlp2_weight"}
    for name, tensor in model.items():
        for old, new in renamed.items():
            if name.endswith(old):  # its rows are inputs
                layer = name.split(".")[2]
                whole[f"block.{layer}.mlp.{new}"] = tensor.transpose(1, 2).contiguous()
    assert {f"weights.{name}" for name in whole} == set(found)
    values = {n: found[f"weights.{n}"].float() for n in whole}  # it has its norms in float32
    assert [n for n, t in whole.items() if not same_bits(values[n], t.float())] == []
    peer = oracle.load_model(tmp_path / "source/hf", torch.float32)
    with torch.no_grad():
        expected = peer(torch.arange(40)[None] * 25 % 101).logits[0]
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return a Python interpreter with gpt-oss's torch model."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "torch==2.13.0", "safetensors", "numpy"], check=True, stdout=sys.stderr)
    without = ["--no-deps", "--ignore-requires-python", "gpt-oss"]
    subprocess.run([*pip, *without], check=True, stdout=sys.stderr)
    return python
