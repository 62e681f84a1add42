"""Merging while converting gives what PEFT gives after loading, or what is nearer to the truth."""

from __future__ import annotations

import independent
import pytest
import torch
from adapter_cases import CASES, Case, converted, name_of
from outputs import same_bits
from peft_models import load
from peft_oracles import (
    Read,
    changed_names,
    float64_merged,
    magnitudes,
    peft_logits,
    peft_merged,
    rounded,
    total_error,
    unit,
)

import gptoss_stream
from gptoss_stream.errors import TensorError

UNITS = 2 * 24 * 2.0**-24
"""Of the sum of all terms' absolute values: what two computations in float32 may differ by.

Each of at most 8 products and sums, of scaling and of adding to the weight adds half a unit; DoRA's
norms and its factors a few more (see test_peft_oracles).
"""


def assert_only_changed(found, base, names):
    """Some tensors have changed, and all others have kept their bits."""
    assert found.keys() == base.keys()
    assert changed_names(base, found) == names
    assert [name for name in found.keys() - names if not same_bits(found[name], base[name])] == []
    assert all(found[name].dtype == base[name].dtype for name in found)


@pytest.mark.parametrize("name", CASES)
def test_float32(name, made, tmp_path):
    """Two computations in float32 differ by their rounding; other tensors are untouched."""
    case, dtype = CASES[name], torch.float32
    base, by_peft = independent.load_folder(made.base(dtype, case.base)), made.by_peft(case, dtype)
    found = converted(made, case, dtype, tmp_path / "out")
    assert_only_changed(found, base, changed_names(base, by_peft))
    bounds = made.magnitudes(case, dtype)
    for key in found:
        differences = (found[key].double() - by_peft[key].double()).abs()
        assert bool((differences <= UNITS * bounds[key]).all()), key


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_rounded_like_peft(name, made, tmp_path):
    """But for 2 and 1 in 1,000, values are PEFT's, and these are next to it.

    Sums in float32 in another order may pass a tie, where PEFT rounds the delta or the result.
    """
    case, dtype = CASES[name], torch.bfloat16
    base, by_peft = independent.load_folder(made.base(dtype, case.base)), made.by_peft(case, dtype)
    found = converted(made, case, dtype, tmp_path / "out", merge_like_peft=True)
    names = changed_names(base, by_peft)
    assert_only_changed(found, base, names)
    different = 0
    for key in names:
        ours, theirs, before = (t[key].double() for t in (found, by_peft, base))
        differences = (ours - theirs).abs()
        different += int((differences > 0).sum())
        units = unit(dtype, ours, theirs, before, ours - before)
        assert bool((differences <= 2 * units).all()), key  # the delta's unit, and the sum's
    assert different <= 2 + sum(found[key].numel() for key in names) / 1000


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_rounded_once(name, made, tmp_path):
    """Values are the nearest to the exact ones but for near ties: no farther than PEFT's."""
    case, dtype = CASES[name], torch.bfloat16
    base, by_peft = independent.load_folder(made.base(dtype, case.base)), made.by_peft(case, dtype)
    exact, found = made.exact(case, dtype), converted(made, case, dtype, tmp_path / "out")
    names = changed_names(base, by_peft)
    assert_only_changed(found, base, names)
    assert_nearest(found, exact, names, made.magnitudes(case, dtype))
    for key in names:
        ours, theirs = (total_error(tensors, exact, [key]) for tensors in (found, by_peft))
        if ".experts." in key and theirs:  # PEFT rounds twice, but not what replaces the base's
            assert ours < theirs, key
        else:  # near ties decide
            assert ours <= theirs * (1 + 1e-6), key


def assert_nearest(found, exact, names, bounds):
    """But for 2 and 1 in 2,000, values are the nearest of bfloat16, and these are next to it.

    Where the delta all but cancels the weight, what float32 loses of it is more than that.
    """
    different = 0
    for key in names:
        nearest = rounded(exact[key], torch.bfloat16)
        differences = (found[key].double() - nearest.double()).abs()
        different += int((differences > 0).sum())
        allowed = unit(torch.bfloat16, nearest, found[key]) + UNITS / 2 * bounds[key]
        assert bool((differences <= allowed).all()), key
    assert different <= 2 + sum(found[key].numel() for key in names) / 2_000


# --- what PEFT merges wrongly, or not at all ------------------------------------------------------


@pytest.mark.parametrize(
    "adapter", ["experts", "gate_up", "down", "attention and experts", "rsLoRA"]
)
def test_one_expert(adapter, made, tmp_path):
    """PEFT adds the delta of a single expert without transposing it, which fails."""
    case = Case(adapter, base="one expert")
    for dtype in (torch.float32, torch.bfloat16):
        base, exact = independent.load_folder(made.base(dtype, case.base)), made.exact(case, dtype)
        found = converted(made, case, dtype, tmp_path / str(dtype))
        assert_only_changed(found, base, changed_names(base, exact))
        assert_near(found, exact, made.magnitudes(case, dtype), dtype)


def assert_near(found, exact, bounds, dtype):
    """Values are rounded once from what was computed in float32 or better."""
    changed = [key for key in exact if not torch.equal(found[key].double(), exact[key])]
    if dtype is torch.bfloat16:
        assert_nearest(found, exact, changed, bounds)
        return
    for key in changed:
        errors = (found[key].double() - exact[key]).abs()
        assert bool((errors <= UNITS / 2 * bounds[key]).all()), key


# --- scale, and several adapters ------------------------------------------------------------------

SCALED = ("attention and experts", "patterns with rsLoRA", "lora_bias", "embedding", "router")


@pytest.mark.parametrize("adapter", SCALED)
@pytest.mark.parametrize("scale", [0.5, 1.75])
def test_scale(scale, adapter, made, tmp_path):
    """It multiplies the deltas."""
    case = Case(adapter)
    for dtype in (torch.float32, torch.bfloat16):
        base, folder = made.base(dtype), made.adapter(case, dtype)
        out = tmp_path / str(dtype)
        given = gptoss_stream.Adapter(folder, scale=scale)
        gptoss_stream.convert(base, out, to="hf", dtype=name_of(dtype), adapters=[given])
        read = Read(folder, scale=scale)
        found, exact = independent.load_folder(out), float64_merged(base, read)
        before = independent.load_folder(base)
        assert_only_changed(found, before, changed_names(before, exact))
        assert_near(found, exact, magnitudes(base, read), dtype)


SEVERAL = [
    ("attention and experts", "patterns"),
    ("experts", "gate_up of one layer", "down"),
    ("router and head saved", "router"),
    ("all biases", "lora_bias"),
    ("DoRA", "attention"),
]
LOST = [
    ("router", "router and head saved"),
    ("lora_bias", "all biases"),
    ("attention", "DoRA"),  # its norms were those of other weights
]
"""Pairs of which the second replaces, or was not trained on, what the first changes."""


@pytest.mark.parametrize("adapters", LOST, ids=" + ".join)
def test_adapters_that_lose_another(adapters, made, tmp_path):
    base = made.base(torch.float32)
    folders = [made.adapter(Case(name), torch.float32) for name in adapters]
    with pytest.raises(TensorError, match=r"an adapter before it changes|would replace what"):
        gptoss_stream.convert(base, tmp_path / "out", to="hf", adapters=folders)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapters", SEVERAL, ids=" + ".join)
def test_several_adapters(adapters, made, tmp_path):
    """Each is merged into what the ones before it give, and all is rounded once."""
    for dtype in (torch.float32, torch.bfloat16):
        base, out = made.base(dtype), tmp_path / str(dtype)
        folders = [made.adapter(Case(name), dtype) for name in adapters]
        gptoss_stream.convert(base, out, to="hf", dtype=name_of(dtype), adapters=folders)
        found, before = independent.load_folder(out), independent.load_folder(base)
        exact = float64_merged(base, *folders)
        assert_only_changed(found, before, changed_names(before, exact))
        assert_near(found, exact, magnitudes(base, *folders), dtype)
        if dtype is torch.float32:
            by_peft, bounds = peft_merged(base, *folders, dtype=dtype), magnitudes(base, *folders)
            for key in found:
                differences = (found[key].double() - by_peft[key].double()).abs()
                assert bool((differences <= UNITS * bounds[key]).all()), key


@pytest.mark.parametrize("adapters", SEVERAL, ids=" + ".join)
def test_several_adapters_rounded_like_peft(adapters, made, tmp_path):
    """PEFT rounds after each of them."""
    dtype = torch.bfloat16
    base, out = made.base(dtype), tmp_path / "out"
    folders = [made.adapter(Case(name), dtype) for name in adapters]
    gptoss_stream.convert(base, out, to="hf", adapters=folders, merge_like_peft=True)
    found, by_peft = independent.load_folder(out), peft_merged(base, *folders, dtype=dtype)
    names = changed_names(independent.load_folder(base), by_peft)
    assert_only_changed(found, independent.load_folder(base), names)
    different = sum(int((found[key] != by_peft[key]).sum()) for key in names)
    assert different <= 2 + sum(found[key].numel() for key in names) / 1000


# --- the model -----------------------------------------------------------------------------------

RUN = [
    "attention and experts",
    "patterns",
    "down of one layer, gate_up of the other",
    "router",
    "rsLoRA",
    "DoRA",
    "lora_bias",
    "all biases",
    "norms and embedding saved",
    "experts saved",
    "tokens of embedding and head",
    "embedding and head",
    "router and head saved",
]


@pytest.mark.parametrize("adapter", RUN)
def test_logits(adapter, made, tmp_path):
    """The merged model gives the logits of the base with the adapter applied by PEFT."""
    case, dtype = Case(adapter), torch.float32
    base, folder = made.base(dtype), made.adapter(case, dtype)
    converted(made, case, dtype, tmp_path / "out")
    tokens = torch.arange(2 * 12).reshape(2, 12) * 17 % 101
    with torch.no_grad():
        before, found = (load(f, dtype)(tokens).logits for f in (base, tmp_path / "out"))
    expected = peft_logits(base, folder, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((before - expected).abs().max()) > 1e-2
