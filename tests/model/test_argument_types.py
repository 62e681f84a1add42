"""Arguments as people have them at hand; all others are one line, in every public function."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import gptoss_stream
from gptoss_stream import DType, GptOssStreamError, OptionError, Selection
from gptoss_stream.loading.output_info import read_output_info
from gptoss_stream.model.numbers import parse_numbers
from gptoss_stream.tensors.dtypes import output_dtype


def text(value) -> str:
    """A value as text that is the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(
    "layers",
    [
        *("0-2", [0, 1, 2], range(3), {0, 1, 2}, (2, 0, 1), ["0-1", 2], np.arange(3)),
        *(torch.arange(3), (n for n in range(3)), [np.int64(0), np.uint8(1), 2], [-4, 1, -2]),
    ],
    ids=text,
)
def test_numbers_of_layers(layers):
    assert parse_numbers(Selection(layers=layers).layers, 4, "layer") == (0, 1, 2)


@pytest.mark.parametrize("layer", [3, -1, "3", np.int32(3), np.array(3), [3], torch.tensor(3)])
def test_one_layer(layer):
    assert parse_numbers(layer, 4, "layer") == (3,)


WRONG_NUMBERS = [1.5, True, b"01", {0: 1}, object(), [0.5], [None], [[0]], [True], np.eye(2), int]


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=text)
@pytest.mark.parametrize("field", ["layers", "experts"])
def test_what_names_no_numbers(field, wrong):
    with pytest.raises(OptionError, match=f"names no {field}; write them as ") as caught:
        Selection(**{field: wrong})
    assert "\n" not in str(caught.value)


def test_groups_and_patterns():
    assert Selection(only="attention, router").only == ("attention", "router")
    assert Selection(only=["norms"]) == Selection(only=("norms",)) == Selection(only="norms")
    assert Selection(include="*.bias", exclude=["a", "b"]).include == ("*.bias",)
    assert Selection(include="blocks.[0,2].*").include == ("blocks.[0,2].*",)  # commas stay
    for wrong in (3, [3], b"norms", {"norms": 1}):
        with pytest.raises(OptionError, match="is no group of tensors; give a text or a list"):
            Selection(only=wrong)
        with pytest.raises(OptionError, match="is no pattern; give a text or a list"):
            Selection(exclude=wrong)


def test_a_selection_as_a_dict(checkpoints):
    expected = gptoss_stream.plan(checkpoints(), selection=Selection("0-1", only=("router",)))
    for selection in ({"layers": [0, 1], "only": "router"}, expected.selection):
        plan = gptoss_stream.plan(checkpoints(), selection=selection)
        assert (plan.selection, plan.num_tensors) == (expected.selection, expected.num_tensors)
    for wrong in ("0-1", {"layer": 0}, {0: 1}, 3, ["layers"]):
        with pytest.raises(OptionError, match="is no selection; give a Selection, or a dict with"):
            gptoss_stream.plan(checkpoints(), selection=wrong)


def test_an_empty_selection_verifies_everything(checkpoints, tmp_path):
    """It is not taken for none, which means what the output's record says."""
    gptoss_stream.convert(checkpoints(), tmp_path, selection={"layers": 0})
    assert gptoss_stream.verify(checkpoints(), tmp_path).equal
    kinds = {
        one.kind for one in gptoss_stream.verify(checkpoints(), tmp_path, selection={}).differences
    }
    assert "missing" in kinds


@pytest.mark.parametrize(
    "kept", ["0,2", [0, 2], {2, 0}, np.array([0, 2]), range(0, 3, 2)], ids=text
)
def test_what_is_kept(kept, checkpoints):
    plan = gptoss_stream.plan(checkpoints(), to="hf", keep_layers=kept, keep_experts=kept)
    assert plan.pruning == {"layers": [0, 2], "experts": {"0": [0, 2], "2": [0, 2]}}
    by_layer = {np.int64(0): np.array([0, 2]), 2: range(0, 3, 2)}
    plan = gptoss_stream.plan(checkpoints(), to="hf", keep_layers=kept, keep_experts=by_layer)
    assert plan.pruning == {"layers": [0, 2], "experts": {"0": [0, 2], "2": [0, 2]}}


@pytest.mark.parametrize("kept", [1.5, b"0", [None], {"0": [1]}, {0: 1}, {0: ["1"]}, {-1: [0]}])
def test_what_says_nothing_about_what_is_kept(kept, checkpoints):
    with pytest.raises(OptionError, match=r"names no experts|are given by layer"):
        gptoss_stream.plan(checkpoints(), keep_experts=kept)
    with pytest.raises(OptionError, match="names no layers"):
        gptoss_stream.plan(checkpoints(), keep_layers=kept)


DTYPES = {
    "BF16": ("bfloat16", "bf16", torch.bfloat16, DType.BF16),
    "F16": ("float16", "fp16", torch.float16, DType.F16),
    "F32": ("float32", "fp32", torch.float32, DType.F32),
}


@pytest.mark.parametrize("code", DTYPES)
def test_dtypes(code, checkpoints):
    for dtype in DTYPES[code]:
        assert output_dtype(dtype).code == code
        plan = gptoss_stream.plan(checkpoints(layers=1), to="hf", dtype=dtype)
        assert (plan.dtype, plan.main_dtype.code) == (DTYPES[code][0], code)
    with gptoss_stream.open_state_dict(checkpoints(layers=1), dtype=DTYPES[code][2]) as weights:
        assert weights["model.norm.weight"].dtype is DTYPES[code][2]


@pytest.mark.parametrize(
    "dtype", ["float", torch.float64, torch.int8, DType.U8, 3, b"x", [], float]
)
def test_what_is_no_dtype(dtype, checkpoints):
    for function in (gptoss_stream.plan, gptoss_stream.open_state_dict):
        with pytest.raises(
            OptionError, match=r"unknown dtype .*(choose one of bfloat16|give a nam)"
        ):
            function(checkpoints(), dtype=dtype)


def test_a_dtype_does_not_import_torch(checkpoints):
    code = (
        "import sys, gptoss_stream as g;"
        "g.plan(sys.argv[1], dtype='bf16', selection={'layers': 0});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoints())], check=True)


@pytest.mark.parametrize("name", [None, 3, b"x", object(), "", "a\0b"], ids=text)
def test_what_is_no_location(name, checkpoints, tmp_path):
    match = "is no path, URL or repository|an empty name|a null character"
    for call in (
        lambda: gptoss_stream.plan(name),
        lambda: gptoss_stream.convert(checkpoints(), name),
        lambda: gptoss_stream.verify(checkpoints(), name),
        lambda: gptoss_stream.synth(name),
        lambda: gptoss_stream.open_state_dict(name),
        lambda: gptoss_stream.open_location(name),
        lambda: gptoss_stream.open_writable_location(name),
    ):
        with pytest.raises(OptionError, match=match):
            call()


def test_locations_as_outputs(checkpoints, tmp_path):
    """A local folder may be named by an opened location too."""
    location = gptoss_stream.open_location(tmp_path)
    gptoss_stream.convert(checkpoints(layers=1), location, selection={"only": "norms"})
    assert read_output_info(location).complete


def test_adapters(checkpoints, tmp_path):
    adapter = gptoss_stream.synth_adapter(tmp_path / "adapter", layers=2, rank=np.int64(2))
    source = checkpoints(layers=2)
    assert gptoss_stream.plan(source, adapters=None).merge is None
    for given in (adapter, str(adapter), [adapter], gptoss_stream.open_location(adapter)):
        assert len(gptoss_stream.plan(source, to="hf", adapters=given).merge.infos) == 1
    assert gptoss_stream.Adapter(adapter, np.float32(0.5)).scale == 0.5
    for wrong in (3, [3], [None], b"x", {adapter: 1}, {adapter}):
        with pytest.raises(OptionError, match="give a location, an Adapter, or a list of them"):
            gptoss_stream.plan(source, to="hf", adapters=wrong)
    for wrong in ("1", None, True, float("nan"), [1]):
        with pytest.raises(OptionError, match="it must be a finite number"):
            gptoss_stream.Adapter(adapter, wrong)


WRONG = [3, -1, 1.5, b"x", object(), [None], {"x": 1}, np.eye(2)]


@pytest.mark.parametrize(
    "name",
    [
        *("plan", "convert", "verify", "verify_checksums", "compare", "synth", "synth_adapter"),
        *("open_state_dict", "load_hf_model", "load_hooked_transformer", "open_location"),
        "Adapter",
    ],
)
def test_a_wrong_argument_is_one_line(name, checkpoints, tmp_path, monkeypatch):
    """Whatever is wrong with it. A value that means something is no fault, such as True or 1.5."""
    monkeypatch.chdir(tmp_path)
    source, output = checkpoints(layers=1), tmp_path / "output"
    gptoss_stream.convert(source, output, checksums=True)
    function, messages = getattr(gptoss_stream, name), []
    parameters = inspect.signature(function).parameters
    needed = {"source": source, "name": source, "location": source, "reference": source}
    needed["output"] = output if "verify" in name else tmp_path / "written"
    needed = {key: needed[key] for key in needed if key in parameters}
    if name != "compare":
        needed.pop("reference", None)
    if name.startswith("synth"):
        needed |= {"layers": 1, "overwrite": True}
    for key, parameter in parameters.items():
        if parameter.annotation in ("bool", "bool | None") or key == "overrides":
            continue
        for wrong in WRONG:
            try:
                function(**{**needed, key: wrong})
            except GptOssStreamError as error:
                messages.append(str(error))
    assert len(messages) >= len(WRONG)
    assert [one for one in messages if "\n" in one or len(one) > 300] == []
