"""inspect --against finds tensors that are rearranged, scaled or changed, in any format."""

from __future__ import annotations

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from loopback import FileServer
from runs import assert_clean_error, run_in_process
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream import CheckpointError, Comparison, Relation
from gptoss_stream.verification.arrangements import arrangements, relate

FORMATS = gptoss_stream.formats.names()
SQUARE = {"layers": 3, "experts": 5, "hidden_size": 64, "intermediate_size": 64}
HALF = {"layers": 2, "experts": 2, "hidden_size": 64, "intermediate_size": 32}
EXPERTS = "model.layers.{}.mlp.experts."


@pytest.fixture
def square(checkpoints):
    """A model in `hf` whose down projections are square, as in the released models."""
    return checkpoints(format="hf", **SQUARE)


@pytest.fixture
def edited(tmp_path):
    """A function that copies a checkpoint and changes the tensors of the copy."""
    numbers = itertools.count()

    def edit(folder, change):
        copy = shutil.copytree(folder, tmp_path / f"edited-{next(numbers)}")
        for file in copy.glob("*.safetensors"):
            tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
            save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, file)
        return copy

    return edit


def only(part: str, change):
    """Change the tensors with a part in their names, and keep the others."""
    return lambda name, tensor: change(tensor) if part in name else tensor


def transposed(tensor):
    return tensor.mT


def halves(tensor):
    """Gate and up, which alternate along the last axis, as halves."""
    return torch.cat([tensor[..., 0::2], tensor[..., 1::2]], -1)


def alternating(tensor):
    gate, up = tensor.chunk(2, -1)
    return torch.stack([gate, up], -1).flatten(-2)


def noisy(share: float, seed: int = 0):
    """Add noise of a norm relative to the tensor's."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensor):
        wide = tensor.float()
        noise = torch.randn(wide.shape, generator=generator)
        return wide + noise * (share * wide.norm() / noise.norm())

    return change


def found(result, tensor: str | None = None) -> set[str]:
    return {str(r) for r in result.relations if tensor in (None, r.tensor)}


def assert_only(result, tensors: dict[str, str]) -> None:
    """Assert what these tensors are throughout, and that all others are equal."""
    for relation in result.relations:
        assert str(relation) == tensors.get(relation.tensor, "equal"), relation


@pytest.mark.parametrize("sizes", [{"layers": 2}, SQUARE, HALF], ids=["distinct", "I=H", "H=2I"])
def test_the_same_model_is_equal_in_every_pair_of_formats(sizes, checkpoints):
    folders = [checkpoints(format=name, **sizes) for name in FORMATS]
    for source, reference in itertools.product(folders, folders):
        result = gptoss_stream.compare(source, reference)
        assert found(result) == {"equal"}
        assert result.rearranged == {}
        assert len({r.tensor for r in result.relations}) >= 20
        assert result.layers == sizes["layers"]


@pytest.mark.parametrize("name", FORMATS)
def test_transposed_square_matrices(name, square, edited, checkpoints):
    """Against a reference in any format."""
    source = edited(square, only("down_proj", lambda t: t.mT if t.ndim == 3 else t))
    reference = checkpoints(format=name, **SQUARE)
    result = gptoss_stream.compare(source, reference)
    assert_only(result, {"down": "transposed"})
    assert result.rearranged == {"down": "transposed"}
    assert sum(r.tensor == "down" for r in result.relations) == 3 * 3
    done = run_in_process("inspect", source, "--against", reference)
    assert done.returncode == 1
    assert "down          3 layers x 3 experts: all transposed\n" in done.stdout
    assert done.stdout.endswith(
        f"down: transposed in every compared tensor; if the reference is as {name} should be, the "
        "source is not as hf should be, and converting it as it is would give a wrong model\n"
    )


def test_transposed_gate_and_up_in_tensors_of_their_own(checkpoints, edited):
    whole = checkpoints(format="transformer-lens", **SQUARE)
    both = (".W_in.weight", ".W_gate.weight")  # the router has the second name too
    source = edited(whole, lambda n, t: t.mT if n.endswith(both) and "experts" in n else t)
    result = gptoss_stream.compare(source, checkpoints(**SQUARE))
    assert_only(result, {"gate_up": "transposed"})


def test_gate_and_up_in_another_order(square, edited, checkpoints):
    """In halves, or wrongly made to alternate; the weight, the bias or both."""
    reference = checkpoints(format="openai", **SQUARE)
    weight, bias, both = "gate_up_proj", "gate_up_proj_bias", {"gate_up", "gate_up_bias"}
    for change, name in ((halves, "halves"), (alternating, "alternating")):
        source = edited(square, only(weight, change))
        result = gptoss_stream.compare(source, reference)
        assert_only(result, dict.fromkeys(both, name))
        assert run_in_process("inspect", source, "--against", reference).returncode == 1
        result = gptoss_stream.compare(reference, source)  # seen from the other side
        opposite = {"halves": "alternating", "alternating": "halves"}[name]
        assert result.rearranged == dict.fromkeys(both, opposite)
    assert_only(
        gptoss_stream.compare(edited(square, only(bias, halves)), reference),
        {"gate_up_bias": "halves"},
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [(transposed, "transposed"), (lambda t: halves(t).mT, "transposed halves")],
    ids=["transposed", "transposed halves"],
)
def test_transposed_gate_and_up_in_one_square_matrix(change, name, checkpoints, edited):
    source = edited(
        checkpoints(format="hf", **HALF),
        only("gate_up_proj", lambda t: change(t) if t.ndim == 3 else t),
    )
    assert_only(gptoss_stream.compare(source, checkpoints(**HALF)), {"gate_up": name})


def test_a_square_attention_matrix(checkpoints, edited):
    sizes = {"layers": 2, "hidden_size": 128}  # 4 heads of 32
    source = edited(checkpoints(format="hf", **sizes), only("o_proj.weight", transposed))
    result = gptoss_stream.compare(source, checkpoints(**sizes))
    assert_only(result, {"o": "transposed"})


def test_one_rearranged_tensor_is_reported_and_is_no_failure(square, edited):
    def change(name, tensor):
        if name == EXPERTS.format(1) + "down_proj":
            return torch.cat([tensor[:4], tensor[4:].mT])
        return tensor

    done = run_in_process("inspect", edited(square, change), "--against", square)
    assert done.returncode == 0
    assert "3 layers x 3 experts: 8 equal, 1 transposed\n" in done.stdout
    assert "layer 1, expert 4: transposed\n" in done.stdout
    assert "wrong model" not in done.stdout


def test_scaled_values(square, edited):
    result = gptoss_stream.compare(edited(square, only("q_proj.w", lambda t: t * -2)), square)
    assert_only(result, {"q": "scaled by -2"})
    rounded = edited(square, only("down_proj", lambda t: (t * 0.3).mT if t.ndim == 3 else t))
    result = gptoss_stream.compare(rounded, square)
    assert found(result, "down") == {"transposed, scaled by 0.3"}
    assert {r.scale for r in result.relations if r.tensor != "down"} == {None}
    huge = edited(square, only("down_proj", lambda t: t.float() * 1e37))
    assert found(gptoss_stream.compare(huge, square), "down") == {"scaled by 1e+37"}
    small = edited(square, only("q_proj.w", lambda t: t.float() * 1.0001))
    assert found(gptoss_stream.compare(small, square), "q") == {"changed by 0.0001"}


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3])
def test_a_fine_tune_is_changed_and_its_arrangement_is_seen(share, square, edited, checkpoints):
    reference = checkpoints(**SQUARE)
    tuned = edited(square, lambda name, tensor: noisy(share)(tensor))
    result = gptoss_stream.compare(tuned, reference)
    assert {(r.values, r.arrangement) for r in result.relations} == {("changed", "")}
    matrices = [r for r in result.relations if r.tensor in ("q", "down", "gate_up", "gate_up_bias")]
    assert all(0.6 * share < r.difference < 1.6 * share for r in matrices)
    assert run_in_process("inspect", tuned, "--against", reference).returncode == 0
    wrong = edited(tuned, only("down_proj", lambda t: t.mT if t.ndim == 3 else t))
    wrong = edited(wrong, only("gate_up_proj", halves))
    result = gptoss_stream.compare(wrong, reference)
    assert result.rearranged == {
        "down": "transposed",
        "gate_up": "halves",
        "gate_up_bias": "halves",
    }
    downs = [r for r in result.relations if r.tensor == "down"]
    assert all(r.values == "changed" and 0.6 * share < r.difference < 1.6 * share for r in downs)
    done = run_in_process("inspect", wrong, "--against", reference)
    assert done.returncode == 1
    assert "all transposed, changed by " in done.stdout


def test_an_unrelated_model_is_changed(square, checkpoints):
    other = checkpoints(format="hf", seed=1, **SQUARE)
    result = gptoss_stream.compare(other, square)
    assert {(r.values, r.arrangement) for r in result.relations} == {("changed", "")}
    assert result.rearranged == {}
    assert run_in_process("inspect", other, "--against", square).returncode == 0


def test_nothing_is_claimed_from_values_that_show_nothing():
    """All zero, constant, symmetric, of rank one and symmetric, a single one, too few."""
    rng = np.random.default_rng(0)
    index = np.arange(64)
    rows, columns = (grid.ravel() for grid in np.meshgrid(index, index, indexing="ij"))
    matrix = rng.standard_normal((64, 64)).astype(np.float32)
    single = np.zeros((64, 64), np.float32)
    single[3, 40] = 1
    for values in (np.zeros_like(matrix), np.ones_like(matrix), matrix + matrix.T, single):
        expected = {
            name: values[arrange(rows, columns)]
            for name, arrange in arrangements("gate_up", 64, 64, is_split=False)
        }
        for found in (values, values.T, values + 1e-3 * matrix, 0 * values):
            relation = relate("gate_up", 0, 0, found.ravel(), expected)
            same = np.array_equal(found, values)
            assert relation.values in (("equal",) if same else ("changed", "scaled"))
            assert relation.arrangement not in ("transposed", "transposed halves")
    one = relate("gate_up_bias", 0, 0, np.array([2.0, 1.0]), {"": np.array([1.0, 2.0])})
    assert (str(one), one.shows_arrangement) == ("changed by 0.63", False)


def test_an_arrangement_must_fit_clearly():
    """Not only a little better, and not only because of one large value."""
    rng = np.random.default_rng(0)
    matrix, other = rng.standard_normal((2, 32, 32)).astype(np.float32)
    expected = {"": matrix.ravel(), "transposed": matrix.T.ravel()}
    for share, arrangement in ((0.0, "transposed"), (0.3, "transposed"), (0.8, "")):
        relation = relate("down", 0, 0, (matrix.T + share * other).ravel(), expected)
        assert (relation.arrangement, relation.shows_arrangement) == (arrangement, True)
    assert not relate("down", 0, 0, 0 * matrix.ravel(), expected).shows_arrangement
    matrix[3, 20] = 1000
    other[20, 3] = 1000
    expected = {"": matrix.ravel(), "transposed": matrix.T.ravel()}
    assert str(relate("down", 0, 0, other.ravel(), expected)).startswith("changed by 1.4")


def test_a_kind_is_rearranged_if_every_tensor_that_can_show_it_is():
    def rearranged(*relations):
        found = [
            Relation("down", 0, 0, "changed", how, 0.1, None, shows) for how, shows in relations
        ]
        return Comparison("", "", "", "", 1, (), 0, (), tuple(found)).rearranged

    assert rearranged(("transposed", True), ("", False)) == {"down": "transposed"}
    assert rearranged(("transposed", True), ("", True)) == {}
    assert rearranged(("", True), ("halves", True)) == {}
    assert rearranged(("transposed", True), ("halves", True)) == {}
    assert rearranged(("", False)) == rearranged() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_finite_numbers_are_changed(value, square, edited):
    source = edited(square, only("down_proj", lambda t: torch.full_like(t, value)))
    for pair in ((source, square), (square, source)):
        result = gptoss_stream.compare(*pair)
        assert_only(result, {"down": "changed", "down_bias": "changed"})
        json.dumps(result.as_dict(), allow_nan=False)


def test_a_nan_scale_of_mxfp4_is_no_number(checkpoints, edited):
    whole = checkpoints(**SQUARE)
    bits = {"down_proj_blocks": 0, "down_proj_scales": 255}

    def damage(name, tensor):
        kind = name.rpartition(".")[2]
        return torch.full_like(tensor, bits[kind]) if kind in bits else tensor

    source = edited(whole, damage)
    assert_only(gptoss_stream.compare(source, whole), {"down": "changed"})


def set_config(folder, **settings) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_absent_biases_are_zero_and_tied_embeddings_are_the_embedding(square, edited):
    """They are missing if that is not what the other checkpoint stores."""
    bias = lambda name: "self_attn" in name and name.endswith("bias")  # noqa: E731
    zeros = edited(square, lambda n, t: torch.zeros_like(t) if bias(n) else t)
    without = edited(square, lambda n, t: None if bias(n) else t)
    (without / "model.safetensors.index.json").unlink()
    set_config(without, attention_bias=False)
    assert found(gptoss_stream.compare(zeros, without)) == {"equal"}
    missing = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), "missing")
    for pair in ((square, without), (without, square)):
        assert_only(gptoss_stream.compare(*pair), missing)
    tied = edited(square, lambda n, t: None if n == "lm_head.weight" else t)
    (tied / "model.safetensors.index.json").unlink()
    set_config(tied, tie_word_embeddings=True)
    assert_only(gptoss_stream.compare(square, tied), {"unembed": "missing"})
    embedding = load_file(next(square.glob("*.safetensors")))["model.embed_tokens.weight"]
    stored = edited(square, lambda n, t: embedding if n == "lm_head.weight" else t)
    assert found(gptoss_stream.compare(stored, tied)) == {"equal"}


def test_json_gives_every_tensor(square, edited):
    source = edited(square, only("down_proj", lambda t: t.mT if t.ndim == 3 else t))
    done = run_in_process("inspect", source, "--against", square, "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert (result["source"], result["reference"]) == (str(source), str(square))
    assert (result["layers"], result["experts"]) == (3, [0, 2, 4])
    assert result["rearranged"] == {"down": "transposed"}
    assert result["num_values"] > 10_000
    assert len(result["relations"]) == 3 + 3 * (13 + 4 * 3)
    assert {
        "tensor": "down",
        "layer": 2,
        "expert": 4,
        "values": "equal",
        "arrangement": "transposed",
        "difference": 0.0,
        "scale": None,
        "shows_arrangement": True,
    } in result["relations"]


def test_what_only_one_model_has_is_not_compared(square, checkpoints):
    """Layers, experts and tokens of the vocabulary."""
    more = checkpoints(format="hf", **{**SQUARE, "layers": 4})
    result = gptoss_stream.compare(more, square)
    assert found(result) == {"equal"}
    assert (result.layers, len(result.notes)) == (3, 1)
    other = checkpoints(format="hf", **{**SQUARE, "experts": 4, "vocab_size": 1500})
    done = run_in_process("inspect", other, "--against", square)
    assert done.returncode == 0
    assert "note: the source has 1500 tokens of the vocabulary, the reference 1009: " in done.stdout
    assert "note: the source has 4 experts, the reference 5: " in done.stdout
    assert "down" not in done.stdout
    assert "o_bias" in done.stdout


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"hidden_size": 96}, "hidden size"),
        ({"intermediate_size": 96}, "intermediate size"),
        ({"num_attention_heads": 8}, "number of attention heads"),
        ({"head_dim": 16}, "head dimension"),
    ],
)
def test_models_of_other_sizes_are_refused(sizes, what, square, checkpoints):
    done = run_in_process("inspect", checkpoints(**{**SQUARE, **sizes}), "--against", square)
    assert_clean_error(done, 2)
    assert f"has the {what} {next(iter(sizes.values()))}, and " in done.stderr


def test_bad_references_are_refused_in_one_line(square, edited, tmp_path):
    lacking = edited(square, lambda n, t: None if n == "lm_head.weight" else t)
    (lacking / "model.safetensors.index.json").unlink()
    for reference in (lacking, tmp_path / "nowhere", tmp_path, "https://host:abc/x", ""):
        assert_clean_error(run_in_process("inspect", square, "--against", reference), 2)
    cut = shutil.copytree(square, tmp_path / "cut")
    file = next(cut.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert_clean_error(run_in_process("inspect", square, "--against", cut), 2)


def test_a_file_that_changes_meanwhile_ends_the_comparison(square, edited, monkeypatch):
    source = edited(square, lambda n, t: t)

    def touch_and_relate(*arguments):
        for file in source.glob("*.safetensors"):
            os.utime(file, (1, 1))
        return relate(*arguments)

    monkeypatch.setattr("gptoss_stream.verification.compare.relate", touch_and_relate)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        gptoss_stream.compare(source, square)


def test_of_a_remote_reference_only_a_small_part_is_read(checkpoints, edited, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sizes = {"layers": 2, "experts": 12, "hidden_size": 256, "intermediate_size": 256}
    whole = checkpoints(**sizes)
    change = only("down_proj", lambda t: t.mT if t.ndim == 3 else t)
    source = edited(checkpoints(format="hf", **sizes), change)
    served = []
    with FileServer(whole) as server:
        answer = server.answer

        def count(request):
            reply = answer(request)
            served.append(len(reply.body) if request.method == "GET" else 0)
            return reply

        server.answer = count
        done = run_in_process("inspect", source, "--against", server.url)
    assert done.returncode == 1, done.stderr
    assert "all transposed" in done.stdout
    total = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    assert total > 3_000_000
    assert sum(served) < total / 4
    assert len(served) < 250
