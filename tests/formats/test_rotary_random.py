"""Random settings of config.json against transformers 5: the same rotary embedding, or refused.

The configuration that is written must mean to transformers what the source's means. The judge is
`GptOssRotaryEmbedding`, and the refusal of transformers where it refuses.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from rotary_configs import BASE, YARN, mutated
from rotary_judge import differences, written
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.config import HookedTransformerConfig
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from gptoss_stream.errors import GptOssStreamError
from gptoss_stream.formats import _transformer_lens_config
from gptoss_stream.formats._hugging_face_config import config_notes, parse_config
from gptoss_stream.tensors.dtypes import DType

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def parameters(**values) -> dict:
    """Return settings as transformers 5 writes them."""
    return {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": {**YARN, **values}}


def output_of(config: dict) -> dict:
    """Return the config.json that is written for a source's."""
    return written(parse_config(copy.deepcopy(config)), config)


def changed(values: dict) -> dict:
    """Return the base configuration with some entries replaced, or removed by `...`."""
    return {key: value for key, value in {**BASE, **values}.items() if value is not ...}


@pytest.mark.parametrize("inner", ["32", 0, None])
def test_the_length_that_does_not_count_is_checked_too(inner):
    """transformers checks it before it takes the one beside the settings."""
    settings = {**YARN, "original_max_position_embeddings": inner}
    with pytest.raises(GptOssStreamError, match="original_max_position_embeddings is"):
        parse_config(changed({"rope_scaling": settings, "original_max_position_embeddings": 2048}))


def test_two_spellings_are_written():
    """So transformers 4 and other programs read the same."""
    output = output_of(changed(parameters(rope_theta=1e5, factor=16.0)))
    assert output["rope_theta"] == output["rope_parameters"]["rope_theta"] == 1e5
    assert output["rope_scaling"] | {"rope_theta": 1e5} == output["rope_parameters"]
    assert output["rope_scaling"]["factor"] == 16.0


def test_experts_per_token_alone_is_written_under_both_names():
    """transformers ignores that name and takes 4 experts; a note says so."""
    config = changed({"num_experts_per_tok": ..., "experts_per_token": 2})
    output = output_of(config)
    assert output["num_experts_per_tok"] == output["experts_per_token"] == 2
    assert ["experts_per_token 2" in note for note in config_notes(config)] == [True]


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 1500), pytest.param(2, 100_000, marks=pytest.mark.slow)]
)
def test_random_settings(seed, count):
    """Whatever is accepted means the same to transformers, and it accepts that too."""
    source, outcomes = random.Random(seed), Counter()
    for _ in range(count):
        config = mutated(source)
        try:
            output = output_of(config)
        except GptOssStreamError:
            outcomes["refused"] += 1
            continue
        assert differences(config, output) == [], config
        outcomes["the same"] += 1
    assert min(outcomes.values()) > count / 5, outcomes


def test_random_settings_in_transformer_lens():
    """TransformerLens rotates by the same angles, with what tl_config.json says."""
    source, compared = random.Random(3), 0
    while compared < 150:
        config = mutated(source)
        try:
            model = parse_config(config)
            _transformer_lens_config.check(model)
        except GptOssStreamError:
            continue
        fields = _transformer_lens_config.hooked_transformer_config(model, DType.F32)
        hooked = HookedTransformerConfig.from_dict(fields | {"n_ctx": 64, "dtype": torch.float32})
        attention = SimpleNamespace(cfg=hooked, attn_type="global")
        sin, cos = AbstractAttention.calculate_sin_cos_rotary(
            attention, hooked.rotary_dim, 64, base=hooked.rotary_base, dtype=torch.float32
        )
        rotary = GptOssRotaryEmbedding(GptOssConfig.from_dict(copy.deepcopy(config)))
        half = model.head_dim // 2
        expected = rotary(torch.zeros(1, 1, 64, model.head_dim), torch.arange(64)[None])
        limit = 2e-5 * max(1.0, abs(rotary.attention_scaling))
        for mine, theirs in zip((cos, sin), expected, strict=True):
            assert (mine[:, :half] - theirs[0]).abs().max() < limit, config
        compared += 1
