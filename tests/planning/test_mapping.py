"""Any two cells of a table: what is made of them is right, or refused in a line."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import permutations
from random import Random

import numpy as np
import pytest
from einops import rearrange

from gptoss_stream.checkpoint.metadata import RawTensor
from gptoss_stream.errors import OptionError
from gptoss_stream.formats._table import Row
from gptoss_stream.model.config import ModelConfig
from gptoss_stream.model.tensors import MODEL_TENSORS
from gptoss_stream.planning.mapping import output_tensors
from gptoss_stream.tensors.dtypes import DType
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
    """A model tensor of layer 0, with no value twice."""
    shape = [MODEL.sizes[axis] for axis in axes_of(tensor)]
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def axes_of(tensor: str) -> list[str]:
    return [axis for axis in MODEL_TENSORS[tensor].split() if axis != "l"]


def stored_by(table: list[Row]) -> dict[str, np.ndarray]:
    """What einops makes of the model for each stored name of a table, rows without fusing."""
    found = {}
    for row in table:
        for layer, expert in MODEL.instances(row.stored):
            array, left = values(row.tensor), axes_of(row.tensor)
            for axis, index in {
                **row.fixed,
                **({"e": expert} if "{e}" in row.stored else {}),
            }.items():
                array = array.take(index, left.index(axis))
                left.remove(axis)
            name = row.stored.format(l=layer, e=expert)
            found[name] = np.ascontiguousarray(rearrange(array, f"{' '.join(left)} -> {row.axes}"))
    return found


def made(source: list[Row], target: list[Row]) -> dict[str, np.ndarray]:
    """What the mapping makes of the first for the second, in pieces that cut units."""
    arrays = stored_by(source)
    raws = {n: RawTensor(n, DType.F32, a.shape, "x", 0) for n, a in arrays.items()}

    class Reader:
        def read(self, tensor, first, shape):
            flat = arrays[tensor.name].reshape(-1)[first : first + int(np.prod(shape))]
            return nullcontext(flat.reshape(shape))

    def make(part, pieces, dtype):
        materialize_rows(part, pieces, dtype, Reader())

    found = {}
    for tensor in output_tensors(tuple(source), tuple(target), MODEL, raws, None):
        out = np.zeros(tensor.nbytes, np.uint8)
        for begin in range(0, tensor.nbytes, 52):
            end = min(begin + 52, tensor.nbytes)
            materialize(tensor, begin, end, out[begin:end], make)
        found[tensor.name] = out.view(np.float32).reshape(tensor.shape)
    return found


def random_rows(tensor: str, random: Random) -> list[Row]:
    """Rows that hold a tensor in some way, sensible or not."""
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
        if not rows or random.random() < 0.2:  # of a table, gate and up usually agree
            order = random.choice([*permutations(axes)])
            text = " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in cut(order, random))
        rows.append(Row(f"{name}.{index}", tensor, text, {"t": index} if fixed else {}))
    return rows


def cut(order, random: Random) -> list[list[str]]:
    """Axes in groups."""
    groups = [[order[0]]]
    for axis in order[1:]:
        if random.random() < 0.4:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


@pytest.mark.parametrize("tensor", ["gate_up", "gate_up_bias", "down", "q", "o", "router", "embed"])
def test_any_two_cells_give_the_right_values_or_a_refusal(tensor):
    random = Random(tensor)
    right = 0
    for _ in range(400):
        source = [] if tensor == "embed" else [EMBED]
        source, target = source + random_rows(tensor, random), random_rows(tensor, random)
        try:
            found = made(source, target)
        except OptionError:
            continue
        wanted = stored_by(target)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, str((source, target)))
        right += 1
    assert right >= 60


def test_gate_and_up_stored_in_different_ways():
    """The rows of one and the columns of the other are not joined as if they were alike."""
    source = [
        EMBED,
        Row("x.{l}.{e}.gate", "gate_up", "m i", {"t": 0}),
        Row("x.{l}.{e}.up", "gate_up", "i m", {"t": 1}),
    ]
    with pytest.raises(OptionError, match="gate and up cannot be joined"):
        made(source, [Row("y.{l}", "gate_up", "e m (i t)")])
    apart = [
        Row("y.{l}.{e}.0", "gate_up", "m i", {"t": 0}),
        Row("y.{l}.{e}.1", "gate_up", "m i", {"t": 1}),
    ]
    found, wanted = made(source, apart), stored_by(apart)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_what_the_source_lacks_is_not_made_up():
    """Only what a model without it computes as zero."""
    with pytest.raises(OptionError, match=r"holds nothing that 'y.0' can be made of"):
        made([EMBED], [Row("y.{l}", "sinks", "n")])
    found = made([EMBED], [Row("y.{l}", "q_bias", "n h"), Row("z", "unembed_bias", "v")])
    assert {name: array.shape for name, array in found.items()} == {"y.0": (4, 3), "z": (7,)}
    assert not any(array.any() for array in found.values())


def test_rows_with_axes_of_another_tensor_are_refused():
    for axes, fixed in (("e m", {}), ("e m (i t)", {"t": 0}), ("e m i i", {}), ("e m i v", {})):
        with pytest.raises(ValueError, match="has the axes"):
            Row("x.{l}", "gate_up", axes, fixed)
