"""transformers 4.57 computes the same rotary embeddings from the written config.json as 5 does.

Slow: it needs an environment of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import venv

import pytest
import torch
from rotary_configs import mutated
from safetensors.torch import load_file
from transformers import GptOssConfig, logging
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from gptoss_stream.errors import GptOssStreamError
from gptoss_stream.formats._hugging_face_config import config_files, parse_config
from gptoss_stream.tensors.dtypes import DType

pytestmark = pytest.mark.slow

COUNT = 3000
SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, __version__, logging
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

assert __version__.startswith("4.57.")
logging.set_verbosity_error()
found = {}
for number, config in enumerate(json.load(open(sys.argv[1]))):
    rotary = GptOssRotaryEmbedding(GptOssConfig.from_dict(config))
    found[f"{number}"] = rotary.inv_freq.clone()
    found[f"{number}.scaling"] = torch.tensor(rotary.attention_scaling, dtype=torch.float64)
save_file(found, sys.argv[2])
"""


def test_transformers_4_computes_the_same(environment, tmp_path):
    """Not the type proportional, which it does not have."""
    source, configs = random.Random(4), []
    while len(configs) < COUNT:
        config = mutated(source)
        try:
            model = parse_config(config)
        except GptOssStreamError:
            continue
        if model.rope_type != "proportional":
            files = config_files(model, config, DType.BF16, partial=False)
            configs.append(json.loads(files["config.json"]))
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    command = [environment, "-c", SCRIPT, tmp_path / "configs.json", tmp_path / "found"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = load_file(tmp_path / "found")
    logging.set_verbosity_error()
    assert len({config["rope_scaling"]["rope_type"] for config in configs}) > 4
    for number, config in enumerate(configs):
        rotary = GptOssRotaryEmbedding(GptOssConfig.from_dict(config))
        assert torch.equal(found[f"{number}"], rotary.inv_freq), config
        assert found[f"{number}.scaling"].item() == rotary.attention_scaling, config


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return a Python interpreter with transformers 4.57."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "torch==2.13.0", "transformers==4.57.*"], check=True, stdout=sys.stderr)
    return python
