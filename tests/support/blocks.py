"""NumPy reference of 8-bit states: blocks of up to 32 elements with a common scale (OCP Microscaling Formats 1.0).

Written from the formats' definitions, in float64, where every product and difference here is exact. A row of dimension
0 is divided into blocks; the last may be shorter.
"""

import numpy as np
from stochastic import GOLDEN, MASK, hash_32_bits, hash_64_bits

BLOCK = 32


def e4m3_values() -> np.ndarray:
    """The value of each code. 0x7f and 0xff, which are NaN, do not occur; kernels read them as 480."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(code & 0x80, -magnitude, magnitude)


VALUES = e4m3_values()


def decoded(codes: np.ndarray, scales: np.ndarray, coding: str) -> np.ndarray:
    """Values in float32 of codes (rows, length) with scales (rows, blocks), both uint8."""
    exponents = np.repeat(scales.astype(np.float64) - 127, BLOCK, axis=1)[:, : codes.shape[1]]
    with np.errstate(over="ignore", under="ignore"):
        stored = flushed((VALUES[codes] * 2.0**exponents).astype(np.float32))
        stored[np.repeat(scales == 255, BLOCK, axis=1)[:, : codes.shape[1]]] = np.nan
        return flushed(stored * stored) if coding == "squares" else stored


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormal numbers become zeros with their sign, as in a step."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def random_bits(key: int, state: int, index: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """20 random bits of each element; `begin` is the index of the first element of its block."""
    with np.errstate(over="ignore"):  # modulo 2^64
        count = begin.astype(np.uint64) * np.uint64(4) + np.uint64(state + 1)
        x = hash_64_bits(np.uint64(key) + count * np.uint64(GOLDEN))
        place = hash_32_bits((index - begin + 1).astype(np.uint64) * np.uint64(0x9E3779B1) & np.uint64(MASK))
        random = place * (x & np.uint64(MASK)) + (x >> np.uint64(32)) & np.uint64(MASK)
    return (random >> np.uint64(12)).astype(np.int64)


@np.errstate(invalid="ignore")
def encoded(
    values: np.ndarray, coding: str, key: int, state: int = 0, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, length) and scales (rows, blocks) of float32 values (rows, length)."""
    rows, length = values.shape
    blocks = -(-length // BLOCK)
    stored = np.sqrt(flushed(values)) if coding == "squares" else flushed(values)
    padded = np.zeros((rows, blocks * BLOCK), dtype=np.float64)
    padded[:, :length] = np.abs(stored)
    largest = padded.reshape(rows, blocks, BLOCK).max(axis=2)
    is_nan = ~(largest <= 448 * 2.0**118)
    # The smallest power of two with which the largest is at most 448, and which is not denormal.
    mantissa, power_of_largest = np.frexp(
        np.where(is_nan, 1.0, largest)
    )  # largest = mantissa * 2^power, 0.5 <= mantissa
    exponent = np.where(mantissa > 0.875, power_of_largest - 8, power_of_largest - 9)
    exponent = np.where(largest == 0, -126, np.maximum(exponent, -126))
    scales = np.where(is_nan, 255, exponent + 127).astype(np.uint8)

    exponents = np.repeat(exponent, BLOCK, axis=1)[:, :length]
    poisoned = np.repeat(is_nan, BLOCK, axis=1)[:, :length]
    scaled = np.where(poisoned, 0.0, stored.astype(np.float64)) * 2.0**-exponents
    scaled = np.where(
        np.abs(scaled) < 2.0**-118, np.copysign(0.0, scaled), scaled
    )  # the factor that kernels use is 2^-8 smaller
    magnitude = np.abs(scaled)
    power = np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-20))), -6)
    power = np.where(2.0**power > magnitude, np.maximum(power - 1, -6), power)  # log2 may round up
    step = 2.0 ** (power - 3)  # between codes
    # Below 2^-6, float32 rounds the sum with 2^-6; its last place is 2^-20 of a step, as the random bits' is.
    in_steps = np.where(magnitude < 2.0**-6, np.round((magnitude + 2.0**-6) * 2.0**29) / 2.0**20 - 8, magnitude / step)
    column = np.arange(length)
    index = (np.arange(first_row, first_row + rows)[:, None]) * length + column
    begin = np.broadcast_to(index - column % BLOCK, index.shape)
    random = random_bits(key, state, index, begin) / 2.0**20
    rounded = np.floor(in_steps + random)
    value = rounded * step
    code = np.searchsorted(VALUES[:128], value)  # exact
    assert (VALUES[:128][code] == value).all()
    if coding == "signed_values":
        code = code | np.where(np.signbit(scaled) & ~poisoned, 0x80, 0)
    else:
        code = np.maximum(code, scaled != 0)
    return code.astype(np.uint8), scales
