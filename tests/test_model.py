"""The output, loaded into a HookedTransformer with its own configuration, is the same model."""

from __future__ import annotations

import json

import oracle
import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

import gptoss_stream


def load_hooked(folder) -> HookedTransformer:
    fields = json.loads((folder / "tl_config.json").read_text())
    fields["dtype"] = getattr(torch, fields["dtype"])
    fields["n_ctx"] = 128  # masks are built for all of it
    model = HookedTransformer(HookedTransformerConfig(**fields, device="cpu"))
    buffers = {name for name, _ in model.named_buffers()}
    missing, unexpected = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    assert unexpected == []
    assert set(missing) <= buffers
    return model.eval()


@torch.no_grad()
def test_the_logits_are_the_hugging_face_models(checkpoints, tmp_path):
    """In float32, over a sequence longer than the sliding window, through both kinds of layer."""
    source = checkpoints()
    gptoss_stream.convert(source, tmp_path / "out", dtype="float32")
    hooked = load_hooked(tmp_path / "out")
    model = oracle.load_model(source, torch.float32).float().eval()
    tokens = torch.randint(1009, (2, 50), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    found = hooked(tokens)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
