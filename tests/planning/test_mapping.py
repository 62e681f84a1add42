"""Any two rows for one model tensor: the mapping gives the right values or refuses the pair."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations
from random import Random

import numpy as np
import pytest
from einops import rearrange

from gptoss_stream.errors import OptionError
from gptoss_stream.formats._table import Row
from gptoss_stream.model.config import ModelConfig
from gptoss_stream.model.pruning import Pruning, ResolvedPruning
from gptoss_stream.model.tensors import MODEL_TENSORS
from gptoss_stream.planning.mapping import output_tensors
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.raw_tensor import RawTensor
from gptoss_stream.transforms.materialize import materialize, materialize_rows

MODEL = ModelConfig(
    num_layers=1,
    num_experts=3,
    experts_per_token=1,
    vocab_size=7,
    hidden_size=5,
    intermediate_size=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    layer_types=("full_attention",),
    sliding_window=None,
    max_position_embeddings=64,
    rope_theta=10_000.0,
    rope={},
)
EMBED = Row("embed", "embed", "v m")


def values(tensor: str) -> np.ndarray:
    """Return a model tensor of layer 0 with no value twice."""
    shape = [MODEL.sizes[axis] for axis in axes_of(tensor)]
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def axes_of(tensor: str) -> list[str]:
    return [axis for axis in MODEL_TENSORS[tensor].split() if axis != "l"]


def stored_by(table: list[Row], kept: Sequence[int] = (0, 1, 2)) -> dict[str, np.ndarray]:
    """Return what einops gives for each stored name of a table, without rows that share one.

    The model has the kept experts only.
    """
    model = replace(MODEL, num_experts=len(kept))
    found = {}
    for row in table:
        for layer, expert in model.instances(row.stored):
            array, left = values(row.tensor), axes_of(row.tensor)
            if "e" in left:
                array = array.take(kept, left.index("e"))
            for axis, index in {
                **row.fixed,
                **({"e": expert} if "{e}" in row.stored else {}),
            }.items():
                array = array.take(index, left.index(axis))
                left.remove(axis)
            name = row.stored.format(l=layer, e=expert)
            found[name] = np.ascontiguousarray(rearrange(array, f"{' '.join(left)} -> {row.axes}"))
    return found


def mapped(
    source: list[Row], target: list[Row], kept: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Return what the mapping makes of a source's tensors for a target, with some experts."""
    if kept is None:
        return map_arrays(stored_by(source), source, target, MODEL)
    pruning = Pruning(None, ",".join(map(str, kept))).resolve(MODEL)
    return map_arrays(stored_by(source), source, target, pruning.model(MODEL), pruning)


def map_arrays(
    arrays: dict[str, np.ndarray],
    source: list[Row],
    target: list[Row],
    model: ModelConfig,
    pruning: ResolvedPruning | None = None,
) -> dict[str, np.ndarray]:
    """Map stored arrays, in byte ranges that begin and end within rows."""
    raws = {n: RawTensor(n, DType.F32, a.shape, "x", 0) for n, a in arrays.items()}

    class Reader:
        def read(self, tensor, first, shape):
            flat = arrays[tensor.name].reshape(-1)[first : first + int(np.prod(shape))]
            return nullcontext(flat.reshape(shape))

    def make(segment, targets, dtype):
        materialize_rows(segment, targets, dtype, Reader())

    found = {}
    tables = tuple(source), tuple(target)
    for tensor in output_tensors(*tables, model, raws, None, pruning=pruning):
        out = np.zeros(tensor.nbytes, np.uint8)
        for begin in range(0, tensor.nbytes, 52):
            end = min(begin + 52, tensor.nbytes)
            materialize(tensor, begin, end, out[begin:end], make)
        found[tensor.name] = out.view(np.float32).reshape(tensor.shape)
    return found


def random_rows(tensor: str, random: Random) -> list[Row]:
    """Return rows that store a tensor in some way, sensible or not."""
    axes = axes_of(tensor)
    name = f"x.{{l}}.{tensor}" if "l" in MODEL_TENSORS[tensor].split() else tensor
    if "e" in axes and random.random() < 0.4:
        name += ".{e}"
        axes.remove("e")
    fixed = "t" in axes and random.random() < 0.4
    if fixed:
        axes.remove("t")
    rows = []
    for index in range(2 if fixed else 1):
        if not rows or random.random() < 0.2:  # gate and up are usually stored in the same way
            order = random.choice([*permutations(axes)])
            groups = random_groups(order, random)
            text = " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)
        rows.append(Row(f"{name}.{index}", tensor, text, {"t": index} if fixed else {}))
    return rows


def random_groups(order, random: Random) -> list[list[str]]:
    """Return axes in groups."""
    groups = [[order[0]]]
    for axis in order[1:]:
        if random.random() < 0.4:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


@pytest.mark.parametrize("tensor", ["gate_up", "gate_up_bias", "down", "q", "o", "router", "embed"])
def test_any_two_rows_give_the_right_values_or_a_refusal(tensor):
    random = Random(tensor)
    right = 0
    for _ in range(400):
        source = [] if tensor == "embed" else [EMBED]
        source, target = source + random_rows(tensor, random), random_rows(tensor, random)
        try:
            found = mapped(source, target)
        except OptionError:
            continue
        expected = stored_by(target)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, str((source, target)))
        right += 1
    assert right >= 60


@pytest.mark.parametrize("tensor", ["gate_up", "gate_up_bias", "down", "router", "q"])
def test_some_experts_of_any_two_rows_give_the_right_values_or_a_refusal(tensor):
    """Wherever a format has the axis of experts, and whichever of them are kept."""
    random = Random(tensor)
    right = 0
    for _ in range(400):
        source, target = [EMBED, *random_rows(tensor, random)], random_rows(tensor, random)
        kept = random.choice([[0], [1], [2], [0, 1], [0, 2], [1, 2]])
        try:
            found = mapped(source, target, kept)
        except OptionError:
            continue
        expected = stored_by(target, kept)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, str((source, target, kept)))
        right += 1
    assert right >= 60


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [2]])
@pytest.mark.parametrize("target", ["e", "e m", "m e"])
@pytest.mark.parametrize("source", ["e", "e m", "m e"])
def test_some_experts_of_one_tensor(source, target, kept):
    """Of the router, whose experts may be its rows or its columns, and of its bias."""
    if (source == "e") != (target == "e"):
        return
    tensor = "router_bias" if source == "e" else "router"
    rows = [EMBED, Row("x.{l}", tensor, source)], [Row("y.{l}", tensor, target)]
    if source == "m e" or (target == "m e" and kept[-1] >= len(kept)):
        with pytest.raises(OptionError, match="cannot be converted to this format"):
            mapped(*rows, kept)
    else:
        np.testing.assert_array_equal(mapped(*rows, kept)["y.0"], stored_by(rows[1], kept)["y.0"])


def test_some_experts_of_rows_one_after_another_in_a_tensor():
    source = [EMBED, *(Row("x.{l}", "gate_up", "e i m", {"t": t}) for t in (0, 1))]
    stored = np.ascontiguousarray(rearrange(values("gate_up"), "e t i m -> (t e) i m"))
    arrays = {"embed": values("embed"), "x.0": stored}
    pruning = Pruning(None, "0,2").resolve(MODEL)
    target = [Row("y.{l}", "gate_up", "e (i t) m")]
    found = map_arrays(arrays, source, target, pruning.model(MODEL), pruning)
    np.testing.assert_array_equal(found["y.0"], stored_by(target, [0, 2])["y.0"])


def test_gate_and_up_stored_in_different_ways():
    """The rows of one and the columns of the other are not joined as if they were the same."""
    source = [
        EMBED,
        Row("x.{l}.{e}.gate", "gate_up", "m i", {"t": 0}),
        Row("x.{l}.{e}.up", "gate_up", "i m", {"t": 1}),
    ]
    with pytest.raises(OptionError, match="gate and up cannot be joined"):
        mapped(source, [Row("y.{l}", "gate_up", "e m (i t)")])
    separate = [
        Row("y.{l}.{e}.0", "gate_up", "m i", {"t": 0}),
        Row("y.{l}.{e}.1", "gate_up", "m i", {"t": 1}),
    ]
    found, expected = mapped(source, separate), stored_by(separate)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("axes", ["l m e", "(l m) e", "l e m"])
def test_layers_stacked_in_one_tensor(axes):
    """One format has a tensor for each layer, the other one tensor for all layers."""
    model = replace(MODEL, num_layers=2, layer_types=MODEL.layer_types * 2)
    embed = {"embed": values("embed")}
    whole = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    separate = {f"x.{layer}": whole[layer] for layer in range(2)}
    stacked = {"y": np.ascontiguousarray(rearrange(whole, f"l e m -> {axes}"))}
    separate_rows, stacked_rows = [Row("x.{l}", "router", "e m")], [Row("y", "router", axes)]
    found = map_arrays(embed | separate, [EMBED, *separate_rows], stacked_rows, model)
    np.testing.assert_array_equal(found["y"], stacked["y"])
    if axes.startswith("l"):
        found = map_arrays(embed | stacked, [EMBED, *stacked_rows], separate_rows, model)
        assert all(np.array_equal(found[name], separate[name]) for name in separate)


def test_tensors_that_the_source_lacks_are_refused():
    """Except those that a model without them computes as zero."""
    with pytest.raises(OptionError, match=r"holds nothing that 'y.0' can be made of"):
        mapped([EMBED], [Row("y.{l}", "sinks", "n")])
    found = mapped([EMBED], [Row("y.{l}", "q_bias", "n h"), Row("z", "unembed_bias", "v")])
    assert {name: array.shape for name, array in found.items()} == {"y.0": (4, 3), "z": (7,)}
    assert not any(array.any() for array in found.values())


def test_rows_with_axes_of_another_tensor_are_refused():
    for axes, fixed in (("e m", {}), ("e m (i t)", {"t": 0}), ("e m i i", {}), ("e m i v", {})):
        with pytest.raises(ValueError, match="has the axes"):
            Row("x.{l}", "gate_up", axes, fixed)
