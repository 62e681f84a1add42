"""Which experts does each layer use, and when does the model know its answer?

python -m gptoss_stream.examples.experts_and_lens CONVERTED PICTURE.png [--text TEXT]

Runs a text, or where the folder has no tokenizer random tokens, through a HookedTransformer that
lives on the disk, and draws two pictures. Above: the share of tokens that the router of each layer
sends to each expert. Below, a logit lens (nostalgebraist, 2020): the residual stream after each
layer, unembedded as if it were the last, and how often its first choice is already the one that
the whole model makes. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gptoss_stream import GptOssStreamError, load_hooked_transformer
from gptoss_stream._utils.failures import missing_package

__all__ = ["draw", "main", "measure"]

TEXT = (
    "The disk is full of weights that nobody has read. To know what a model does, one looks at it "
    "piece by piece: which expert was asked, and after which layer the answer stood."
)


def measure(model: Any, tokens: Any) -> tuple[Any, Any]:
    """The usage of experts [layer, expert], each row adding up to 1, and the agreement of the
    logit lens with the model's choice [layer], for tokens [batch, position]."""
    import torch

    experts: list[torch.Tensor] = []
    choices: list[torch.Tensor] = []

    def count(indices: torch.Tensor, hook: object) -> None:
        uses = torch.bincount(indices.flatten().cpu(), minlength=model.cfg.num_experts)
        experts.append(uses / uses.sum())

    def read(residual: torch.Tensor, hook: object) -> None:
        choices.append(model.unembed(model.ln_final(residual)).argmax(-1).cpu())

    layers = range(model.cfg.n_layers)
    with torch.no_grad():
        logits = model.run_with_hooks(
            tokens,
            fwd_hooks=[
                *((f"blocks.{layer}.mlp.hook_expert_indices", count) for layer in layers),
                *((f"blocks.{layer}.hook_resid_post", read) for layer in layers),
            ],
        )
    final = logits.argmax(-1).cpu()
    return torch.stack(experts), torch.stack([(c == final).float().mean() for c in choices])


def draw(usage: Any, agreement: Any, picture: Path) -> None:
    """Both measurements as one picture; raises `MissingPackageError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package(error, "examples") from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[2, 1])
    image = above.imshow(usage, aspect="auto", interpolation="nearest")
    above.set(title="Share of the choices of a layer's router", xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=above)
    below.plot(range(len(agreement)), agreement, marker="o")
    below.set(
        title="Logit lens: first choice is the final one",
        xlabel="after layer",
        ylabel="share of positions",
        ylim=(-0.05, 1.05),
    )
    figure.savefig(picture, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("converted", help="folder of the format transformer-lens")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--text", default=TEXT, help="what the model reads")
    arguments = parser.parse_args(argv)
    try:
        model = load_hooked_transformer(arguments.converted)
        if model.tokenizer is None:
            import torch

            tokens = torch.randint(model.cfg.d_vocab, (1, 64), generator=torch.Generator())
        else:
            tokens = model.to_tokens(arguments.text)
        usage, agreement = measure(model, tokens)
    except GptOssStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        draw(usage, agreement, arguments.picture)
    except (OSError, ValueError) as error:
        print(f"error: {arguments.picture}: {error}", file=sys.stderr)
        return 2
    most = usage.max(-1)
    for layer, (share, expert) in enumerate(zip(*most, strict=True)):
        print(
            f"layer {layer:2}: expert {int(expert):3} takes {share:.0%} of the choices; "
            f"the lens agrees at {agreement[layer]:.0%} of the positions"
        )
    print(f"{arguments.picture}: {tokens.numel()} tokens, {len(usage)} layers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
