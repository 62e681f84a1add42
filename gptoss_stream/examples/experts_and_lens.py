"""Which experts does each layer use, and after which layer does the model know its answer?

    python -m gptoss_stream.examples.experts_and_lens CHECKPOINT PICTURE.png [--text TEXT]

Runs a text through a HookedTransformer straight off a checkpoint, of any format, and draws two
plots:

- How often the router of each layer chooses each expert.
- A logit lens (nostalgebraist, 2020): the residual stream after each layer is unembedded as if that
  layer were the last. The plot shows for how many positions the most likely token is already the
  one that the whole model predicts.

Without a tokenizer in CHECKPOINT, random tokens are used. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_stream import GptOssStreamError, load_hooked_transformer
from gptoss_stream._utils.failures import missing_package

if TYPE_CHECKING:
    import torch

__all__ = ["draw", "main", "measure"]

TEXT = (
    "The disk is full of weights that nobody has read. To know what a model does, one looks at it "
    "piece by piece: which expert was asked, and after which layer the answer stood."
)


def measure(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure expert usage and the agreement of the logit lens with the model.

    Args:
        model: A HookedTransformer with experts.
        tokens: Token IDs, [batch, position].

    Returns:
        The share of each expert among the router's choices, [layer, expert], where each row sums
        to 1; and the share of positions at which the logit lens agrees with the model's
        prediction, [layer].
    """
    import torch

    usage: list[torch.Tensor] = []
    lens_tokens: list[torch.Tensor] = []

    def count_experts(indices: torch.Tensor, hook: object) -> None:
        counts = torch.bincount(indices.flatten().cpu(), minlength=model.cfg.num_experts)
        usage.append(counts / counts.sum())

    def apply_lens(residual: torch.Tensor, hook: object) -> None:
        lens_tokens.append(model.unembed(model.ln_final(residual)).argmax(-1).cpu())

    layers = range(model.cfg.n_layers)
    with torch.no_grad():
        logits = model.run_with_hooks(
            tokens,
            fwd_hooks=[
                *((f"blocks.{layer}.mlp.hook_expert_indices", count_experts) for layer in layers),
                *((f"blocks.{layer}.hook_resid_post", apply_lens) for layer in layers),
            ],
        )
    predicted = logits.argmax(-1).cpu()
    agreement = [(lens == predicted).float().mean() for lens in lens_tokens]
    return torch.stack(usage), torch.stack(agreement)


def draw(usage: torch.Tensor, agreement: torch.Tensor, picture: Path) -> None:
    """Draw both measurements as one picture.

    Args:
        usage: As from `measure`.
        agreement: As from `measure`.
        picture: The image file to write.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        OSError: If the file cannot be written.
        ValueError: If matplotlib does not know the file's type.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package(error, "examples") from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[2, 1])
    image = top.imshow(usage, aspect="auto", interpolation="nearest")
    top.set(title="Expert usage: share of the router's choices", xlabel="expert", ylabel="layer")
    top.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=top)
    bottom.plot(range(len(agreement)), agreement, marker="o")
    bottom.set(
        title="Logit lens: agreement with the model's prediction",
        xlabel="after layer",
        ylabel="share of positions",
        ylim=(-0.05, 1.05),
    )
    bottom.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(picture, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The command line without the program's name; by default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help="folder of a gpt-oss, or a repository of the Hub")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--text", default=TEXT, help="text that the model reads")
    arguments = parser.parse_args(argv)
    try:
        model = load_hooked_transformer(arguments.checkpoint)
        tokens = _tokens(model, arguments.text)
        usage, agreement = measure(model, tokens)
    except GptOssStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        draw(usage, agreement, arguments.picture)
    except (OSError, ValueError) as error:
        print(f"error: {arguments.picture}: {error}", file=sys.stderr)
        return 2
    for layer, (share, expert) in enumerate(zip(*usage.max(-1), strict=True)):
        print(
            f"layer {layer:2}: expert {int(expert):3} gets {share:.0%} of the router's choices; "
            f"the logit lens agrees at {agreement[layer]:.0%} of the positions"
        )
    print(f"{arguments.picture}: {tokens.numel()} tokens, {len(usage)} layers")
    return 0


def _tokens(model: Any, text: str) -> torch.Tensor:
    """Return the tokens of a text, or random ones if the model has no tokenizer."""
    import torch

    if model.tokenizer is not None:
        tokens: torch.Tensor = model.to_tokens(text)
        return tokens
    return torch.randint(model.cfg.d_vocab, (1, 64), generator=torch.Generator())


if __name__ == "__main__":
    raise SystemExit(main())
