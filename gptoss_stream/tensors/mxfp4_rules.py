"""The rules by which floats become MXFP4.

OCP Microscaling Formats (MX) v1.0, sections 5.1 to 6.3. 32 values of a row become a block: a scale
byte s, which means 2^(s-127), and 32 codes of 4 bits. The specification leaves open how the scale
follows from the largest magnitude m of a block and where ties go, and programs differ. The rules
that have names here:

    name      exponent of the scale           a tie goes to      codes of zeros
    openai    ceil(log2(m / 6))               the even code      keep the sign
    modelopt  ceil(log2(m / 6))               the smaller code   are -0
    ocp       floor(log2(m)) - 2              the even code      keep the sign
    even      floor(log2(r(m))) - 2           the even code      keep the sign

r(m) is m rounded to one bit of mantissa, so that the exponent is one larger from 1.75 * 2^k on.
With ceil(log2(m / 6)) no value exceeds 6, the largest code; with the two others some are clipped,
which get the largest code. The smallest scale byte is 0, and with openai 1 unless a block is zero.
Blocks with a scale byte above 252 are refused: their largest codes are infinite in bfloat16.

Values that MXFP4 holds are encoded without loss, whatever the rule. The one exception is openai
with the scale byte 0, 2^-127, which it writes for no block that is not zero.

Sources: openai is ROUND_UP of triton_kernels, `numerics_details/mxfp.py` (`downcast_to_mxfp_torch`)
since September 2025, which OpenAI's code, transformers and vLLM call; the same scales as RCEIL of
torchao, but for byte 0. modelopt is nvidia-modelopt, `MXFP4QTensor.quantize`. ocp is section 6.3 of
the specification, FLOOR of torchao. even is the rule of compressed-tensors and AMD Quark, EVEN of
torchao. All of them take values in bfloat16, as those programs do: others are rounded to it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DEFAULT_RULE", "RULES", "Rule"]

_MIDPOINTS = (0, 192, 288, 352, 416, 480, 544)
"""The midpoints between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 of codes 0 to 7, which are
0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5, as distances."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How the scale follows from a block's largest magnitude, and where ties go."""

    carry: int
    """What is added to the bits of the largest magnitude: its exponent is then one larger if its
    mantissa, of 7 bits, is at least 128 - carry."""
    ties_to_even: bool
    """Whether a tie goes to the even code; otherwise to the smaller one."""
    zero_is_negative: bool
    """Whether zeros of either sign get the code of -0."""

    smallest_scale: int = 0
    """The smallest scale byte of a block that is not zero."""
    midpoints: tuple[int, ...] = field(init=False)
    """The distances (see `mxfp4_encoder`) that a value must exceed for each further code."""

    def __post_init__(self) -> None:
        midpoints = tuple(
            midpoint - (self.ties_to_even and code % 2 == 0)
            for code, midpoint in enumerate(_MIDPOINTS, 1)
        )
        object.__setattr__(self, "midpoints", midpoints)

    @property
    def clips(self) -> bool:
        """Whether values can exceed the largest code: the mantissa of 6, 1.5, has 64 of 128."""
        return self.carry < 128 - 64 - 1


RULES: Mapping[str, Rule] = {
    "openai": Rule(carry=0x3F, ties_to_even=True, zero_is_negative=False, smallest_scale=1),
    "modelopt": Rule(carry=0x3F, ties_to_even=False, zero_is_negative=True),
    "ocp": Rule(carry=0, ties_to_even=True, zero_is_negative=False),
    "even": Rule(carry=0x20, ties_to_even=True, zero_is_negative=False),
}

DEFAULT_RULE = "openai"
