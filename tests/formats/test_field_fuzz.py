"""Random changes to the names, shapes and dtypes of small checkpoints, some at a time.

Each checkpoint is converted or refused in one line. When it is converted, the tensors are those
that a few rules give, which know nothing of the package: a tensor may lose what is around its name,
may be turned back if it is transposed, and must be used once. The changes are random, but the same
in each run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from field_models import (
    EXPERT_MATRICES,
    MXFP4,
    Tensors,
    around_layers,
    config,
    model,
    packed,
    save,
    write,
)
from outputs import load_output, same_bits

import gptoss_stream
from gptoss_stream.errors import GptOssStreamError

HEAD = "lm_head.weight"
PACKED = packed(model())


@dataclass
class State:
    """A checkpoint in the making, and what is known of it."""

    stored: Tensors
    right: Tensors
    """The tensors that the output must have if there is one."""
    config: dict = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    """Reasons for which it must be refused."""
    harmless: int = 0
    """The number of tensors that are not part of the model."""


def pick(rng: random.Random, state: State, ends: str = "") -> str:
    return rng.choice(sorted(name for name in state.stored if name.endswith(ends)))


def rename(state: State, change: Callable[[str], str]) -> None:
    state.stored = {change(name): tensor for name, tensor in state.stored.items()}


# --- changes that keep the model ----------------------------------------------------------------

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "a.b.model.")
PARTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_fpw_module.")


def wrap_all(rng, state):
    prefix = rng.choice(PREFIXES)
    # "model.embed_tokens.weight" would not show whether "model." is of the prefix.
    if not (prefix.endswith("model.") and "embed_tokens.weight" in state.stored):
        rename(state, lambda name: prefix + name)


def wrap_layers(rng, state):
    state.stored = around_layers(rng.choice(PARTS))(state.stored)


def wrap_some_inside(rng, state):
    part, chosen = rng.choice(PARTS), rng.choice((".mlp.", ".self_attn.", ".1."))
    rename(state, lambda name: name.replace(chosen, f"{chosen}{part}"))


def cut_model(rng, state):
    if all(name.startswith(("model.", "lm_head.")) for name in state.stored):
        rename(state, lambda name: name.removeprefix("model."))


def turn_all(rng, state):
    """All experts' matrices, or those of gate and up, or of down. Only known names are turned."""
    ends = rng.choice((EXPERT_MATRICES, *((end,) for end in EXPERT_MATRICES)))
    if not state.refused:
        for name, tensor in state.stored.items():
            if name.endswith(ends) and tensor.shape in ((4, 64, 192), (4, 96, 64)):
                state.stored[name] = tensor.transpose(1, 2)


def reshape_blocks(rng, state):
    for name, tensor in state.stored.items():
        if name.endswith("_blocks") and tensor.ndim == 4 and rng.random() < 0.7:
            experts, rows = tensor.shape[:2]
            shape = rng.choice([(experts, rows, -1), (experts, rows, 1, tensor[0, 0].numel())])
            state.stored[name] = tensor.reshape(shape)


def type_scales(rng, state):
    for name, tensor in state.stored.items():
        if name.endswith("_scales") and tensor.dtype == torch.uint8:
            state.stored[name] = tensor.view(torch.float8_e8m0fnu)


def stale_quantization(rng, state):
    if not any(name.endswith("_blocks") for name in state.stored):
        value = rng.choice([MXFP4, {}, None, {"quant_method": "gptq"}, {**MXFP4, "dequantize": 1}])
        state.config["quantization_config"] = value


def tie(rng, state):
    state.config["tie_word_embeddings"] = True


def drop_tied_head(rng, state):
    if state.config.get("tie_word_embeddings") and not state.refused:
        state.stored = {n: t for n, t in state.stored.items() if not n.endswith(HEAD)}
        state.right.pop(HEAD, None)


def add_harmless(rng, state):
    name = rng.choice(("rotary_emb.inv_freq", "k_scale", "v_scale", "q_proj.input_scale"))
    beside = pick(rng, state, "sinks").removesuffix("sinks")
    state.harmless += f"{beside}{name}" not in state.stored
    state.stored[f"{beside}{name}"] = torch.ones(3)


def float32(rng, state):
    """Exact numbers in a wider dtype: `hf` keeps the source's dtype, MXFP4 is written as BF16."""
    name = pick(rng, state)
    if state.stored[name].dtype == torch.bfloat16:
        state.stored[name] = state.stored[name].float()


# --- changes that break it ----------------------------------------------------------------------


def drop(rng, state):
    name = pick(rng, state)
    if not name.endswith(HEAD) and "rotary" not in name and "_scale" not in name[-8:]:
        del state.stored[name]
        state.refused.append(f"dropped {name}")


def misname(rng, state):
    name = pick(rng, state)
    part = rng.choice(("x_", "w", "v2."))
    if "rotary" not in name and "_scale" not in name[-8:] and not name.endswith(HEAD):
        head, _, tail = name.rpartition(".")
        state.stored[f"{head}.{part}{tail}"] = state.stored.pop(name)
        state.refused.append(f"renamed {name}")


def wrap_one(rng, state):
    """One name with a prefix that the others lack."""
    name = pick(rng, state, "norm.weight")
    state.stored["other." + name] = state.stored.pop(name)
    state.refused.append(f"wrapped {name}")


def copy(rng, state):
    """The same tensor with other values under a name that differs in what is around it."""
    name = pick(rng, state)
    if "rotary" not in name and "_scale" not in name[-8:]:
        state.stored[rng.choice(("other.", "_orig_mod.", "module.")) + name] = state.stored[name]
        state.refused.append(f"copied {name}")


def add_significant(rng, state):
    beside = pick(rng, state, "router.weight").removesuffix("router.weight")
    name = rng.choice(
        ("experts.down_proj_weight_scale", "experts.extra", "router.lora_A.weight", "shared.weight",
         "experts.down_proj.absmax", "experts.down_proj_zeros", "router.correction_bias")
    )  # fmt: skip
    state.stored[beside + name] = torch.ones(4)
    state.refused.append(f"added {name}")


def turn_one(rng, state):
    """A matrix that is not square in one layer, or the blocks' rows and groups."""
    name = pick(rng, state)
    tensor = state.stored[name]
    if tensor.ndim > 1 and tensor.shape[-1] != tensor.shape[-2] and "layers.1." in name:
        state.stored[name] = tensor.transpose(-1, -2)
        state.refused.append(f"turned {name}")


def cast_wrong(rng, state):
    name = pick(rng, state)
    if "rotary" not in name and "_scale" not in name[-8:]:
        state.stored[name] = state.stored[name].float().to(torch.float64)
        state.refused.append(f"float64 {name}")


def cut_rows(rng, state):
    name = pick(rng, state)
    if "rotary" not in name and "_scale" not in name[-8:]:
        state.stored[name] = state.stored[name][1:]
        state.refused.append(f"cut {name}")


KEEPING = (wrap_all, wrap_layers, wrap_some_inside, cut_model, turn_all, reshape_blocks,
           type_scales, stale_quantization, tie, drop_tied_head, add_harmless, float32)  # fmt: skip
BREAKING = (drop, misname, wrap_one, copy, add_significant, turn_one, cast_wrong, cut_rows)


def random_state(rng: random.Random) -> State:
    """Return a checkpoint with up to five changes, of which none or one breaks it."""
    plain = model()
    stored, plain = PACKED if rng.random() < 0.4 else (plain, plain)
    state = State(dict(stored), dict(plain))
    changes = [rng.choice(KEEPING) for _ in range(rng.randrange(5))]
    if rng.random() < 0.4:
        changes.insert(rng.randrange(len(changes) + 1), rng.choice(BREAKING))
    for change in changes:
        change(rng, state)
    return state


def fault(state: State, folder) -> str:
    """Convert a checkpoint; return what is wrong with the outcome, or "" and count it."""
    source = folder / "source"
    source.mkdir(parents=True)
    save(source / "model.safetensors", state.stored)
    write(source, {"config.json": config(**state.config)})
    try:
        report = gptoss_stream.convert(source, folder / "out", to="hf", dtype="bfloat16")
    except GptOssStreamError as error:
        if "\n" in str(error) or (folder / "out").exists():
            return f"not one line, or something written: {error}"
        return "" if state.refused else f"refused: {error}"
    if state.refused:
        return f"converted though {state.refused}"
    found = load_output(folder / "out")
    wrong = [
        name
        for name in found.keys() | state.right.keys()
        if name not in found
        or name not in state.right
        or not same_bits(found[name], state.right[name])
    ]
    if wrong:
        return f"other tensors: {sorted(wrong)[:3]}"
    return "" if len(report.unmapped) == state.harmless else f"unmapped: {report.unmapped}"


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 150), pytest.param(2, 3000, marks=pytest.mark.slow)]
)
def test_random_changes(seed, count, tmp_path):
    faults, outcomes = {}, Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        state = random_state(rng)
        try:
            found = fault(state, tmp_path / str(number))
        except Exception as error:  # any other is a failure
            found = f"raised {error!r}"
        if found:
            faults.setdefault(found[:60], f"{number}: {found} ({sorted(state.stored)[:2]})")
        outcomes["refused" if state.refused else "converted"] += 1
    print(outcomes)
    assert not faults, "\n".join(faults.values())
    assert min(outcomes["refused"], outcomes["converted"]) > count / 4
