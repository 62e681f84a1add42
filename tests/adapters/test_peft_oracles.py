"""The formulas that adapters are checked with agree with PEFT, so that neither is wrong alone."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import CASES
from independent import load_folder
from peft_oracles import changed_names

UNITS = 24 * 2.0**-24
"""Of the sum of all terms' absolute values: what one computation in float32 may be wrong by.

Each of at most 8 products and sums, of scaling and of adding to the weight adds half a unit; DoRA's
norms of up to 101 squares and its factors a few more.
"""


@pytest.mark.parametrize("name", CASES)
def test_peft_merges_what_the_formulas_say(name, made):
    """In float32: the same tensors change, and every value is near to the float64 one."""
    case = CASES[name]
    base = load_folder(made.base(torch.float32, case.base))
    found, exact = (get(case, torch.float32) for get in (made.by_peft, made.exact))
    bounds = made.magnitudes(case, torch.float32)
    assert found.keys() == exact.keys() == base.keys()
    changed = changed_names(base, found)
    assert changed == changed_names(base, exact) != set()
    for key in exact:
        errors = (found[key].double() - exact[key]).abs()
        assert bool((errors <= UNITS * bounds[key]).all()), key
    for key in changed:  # all of it, and by more than rounding
        moved = (exact[key] - base[key].double()).abs()
        assert float(moved.mean()) > 1e-3 * float(base[key].abs().mean()), key
