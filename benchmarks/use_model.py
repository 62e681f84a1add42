"""Loads a model in one way and uses it: prints seconds and memory as JSON.

    python benchmarks/use_model.py WAY FOLDER [--tokens 64 64 256] [--new 6]

WAY is `direct` (`load_hf_model`), `hooked` (`load_hooked_transformer`), `transformers`
(`from_pretrained`, which maps a folder in bfloat16 and dequantizes MXFP4 in memory) or `offload`
(`from_pretrained` with all weights left on the disk). For each number of tokens it runs one pass
and takes the last logits, and then it generates `--new` tokens after a prompt of 8. With
`--without-numba` it runs as if numba were not installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any


def load(way: str, folder: Path, cache: str) -> Any:
    """Load a model."""
    if way == "direct":
        import gptoss_stream

        return gptoss_stream.load_hf_model(folder, expert_cache=cache)
    if way == "hooked":
        import gptoss_stream

        return gptoss_stream.load_hooked_transformer(folder, n_ctx=512, expert_cache=cache)
    from transformers import AutoModelForCausalLM, Mxfp4Config

    options: dict[str, Any] = {"dtype": "bfloat16"}
    if way == "offload":
        options |= {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
    elif "quantization_config" in json.loads((folder / "config.json").read_text()):
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def vocabulary(model: Any) -> int:
    """Return the number of tokens that a model knows."""
    return int(model.cfg.d_vocab if hasattr(model, "cfg") else model.config.vocab_size)


def one_pass(model: Any, count: int) -> float:
    """Return the seconds of a pass with so many tokens."""
    import torch

    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(0, min(200_000, vocabulary(model)), (1, count), generator=generator)
    began = time.perf_counter()
    with torch.no_grad():
        output = model(tokens)
        logits = getattr(output, "logits", output)[0, -1].float()
    assert logits.isfinite().all()
    return time.perf_counter() - began


class _Times:
    """Notes when each token is generated."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def new_tokens(model: Any, count: int) -> list[float]:
    """Return the seconds of each token that is generated, without the first."""
    import torch

    times = _Times()
    prompt = torch.arange(8)[None] * 2311 % vocabulary(model)
    model.generate(
        prompt, max_new_tokens=count + 1, min_new_tokens=count + 1, do_sample=False, streamer=times
    )
    return [after - before for before, after in zip(times.times[1:], times.times[2:], strict=False)]


def memory() -> dict[str, int]:
    """Return bytes of this process: anonymous now, and resident at most."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    status = Path("/proc/self/status").read_text()
    kilobytes = {
        "anonymous": re.search(r"Anonymous:\s+(\d+)", rollup),
        "peak_rss": re.search(r"VmHWM:\s+(\d+)", status),
    }
    return {name: int(found[1]) * 1024 for name, found in kilobytes.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("direct", "hooked", "transformers", "offload"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 64, 256])
    parser.add_argument("--new", type=int, default=6)
    parser.add_argument("--cache", default="0", help="expert_cache")
    parser.add_argument("--without-numba", action="store_true")
    arguments = parser.parse_args()
    if arguments.without_numba:
        sys.modules["numba"] = None  # type: ignore[assignment]
    import torch

    # Imports are not the loading of a model.
    importlib.import_module("transformer_lens" if arguments.way == "hooked" else "transformers")
    import gptoss_stream  # noqa: F401

    torch.manual_seed(0)
    before = memory()["anonymous"]
    began = time.perf_counter()
    model = load(arguments.way, arguments.folder, arguments.cache)
    loaded = time.perf_counter() - began
    opened = memory()["anonymous"] - before
    passes = [one_pass(model, count) for count in arguments.tokens]
    tokens = new_tokens(model, arguments.new) if arguments.new else []
    result = {"load": loaded, "passes": passes, "new": tokens, "opened": opened, **memory()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
