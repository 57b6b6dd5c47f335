"""tests/support/every_float.py checks all 2^32 numbers; here is one part of them for each encoder."""

import every_float
import pytest


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize("encoder", every_float.ENCODERS)
@pytest.mark.parametrize("part", [0, 1013])
def test_some_of_all_numbers(encoder, part):
    """Zero and denormal numbers, and a million below 0.875."""
    every_float.check(encoder, part)
