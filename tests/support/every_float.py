"""All 2^32 float32 numbers, through each encoder, against the NumPy reference of its format.

``python tests/support/every_float.py [ENCODER ...]`` checks the encoders that are named, or all of them. It is for
changes of a format: on two cores it takes an hour. Tests check two parts in 4096.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
import time

import blocks
import numpy as np
import onepass
import stochastic
import torch

PARTS = 4096
KEY = 0x9E3779B97F4A7C15
CODINGS = ("signed_values", "magnitudes", "squares")
ENCODERS = (
    *CODINGS,
    *(f"{coding}, smaller neighbours" for coding in CODINGS),
    *(f"{name}, {rounding}" for name in stochastic.FORMATS for rounding in ("nearest", "stochastic")),
)


def numbers_of(part: int) -> np.ndarray:
    """The float32 numbers whose bits are consecutive, from part * 2^32 / PARTS."""
    length = (1 << 32) // PARTS
    return np.arange(part * length, (part + 1) * length, dtype=np.int64).astype(np.uint32).view(np.float32)


def check_blocks(values: np.ndarray, coding: str, part: int) -> None:
    values = values.reshape(-1, 4096)
    codes = torch.zeros(values.shape, dtype=torch.float8_e4m3fn)
    scales = torch.zeros((len(values), values.shape[1] // blocks.BLOCK), dtype=torch.float8_e8m0fnu)
    state = part % 4
    onepass._core.encode_blocks(torch.from_numpy(values), coding, KEY, state, part, codes, scales)
    wanted, wanted_scales = blocks.encoded(values, coding, KEY, state, part)
    np.testing.assert_array_equal(scales.view(torch.uint8).numpy(), wanted_scales)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), wanted)


@np.errstate(over="ignore", invalid="ignore")
def with_larger_neighbours(values: np.ndarray, lane: int) -> np.ndarray:
    """In each block, one element becomes larger than the others by up to 2^24, so that they have smaller codes."""
    values = values.reshape(-1, blocks.BLOCK).copy()
    values[:, lane] *= np.float32(2.0) ** (np.arange(len(values)) % 25).astype(np.float32)
    return values.reshape(-1)


def check_16_bits(values: np.ndarray, name: str, rounding: str, part: int) -> None:
    dtype = getattr(torch, name)
    if rounding == "stochastic":
        rounded = torch.from_numpy(blocks.flushed(values))  # as every result of a step
        first, stream = part * len(values), part % (stochastic.PARAM + 1)
        onepass._core.round_stochastically(rounded, name, KEY, stream, first)
        found = rounded.to(dtype)
        has_it = rounded.abs() <= torch.finfo(dtype).max  # larger numbers become infinite when they are stored
        np.testing.assert_array_equal(found[has_it].float().numpy(), rounded[has_it].numpy())
        wanted = stochastic.rounded(values, name, KEY, stream, np.arange(first, first + len(values)))
    else:
        p = torch.nn.Parameter(torch.zeros(values.shape))
        p.grad = torch.from_numpy(values)
        optimizer = onepass.SGD([p], lr=0.0, momentum=0.9, state_dtype=dtype)
        optimizer.step()  # whose first momentum is the gradient
        found = optimizer.state[p]["momentum_buffer"]
        wanted = nearest(values, name)
    np.testing.assert_array_equal(found.double().numpy(), wanted)


@np.errstate(invalid="ignore")
def nearest(values: np.ndarray, name: str) -> np.ndarray:
    """The nearest number of a format, of two the even one, as float64. A step takes denormal float32 for zero."""
    significant, smallest, _ = stochastic.FORMATS[name]
    wide = blocks.flushed(values).astype(np.float64)
    finite = np.where(np.isfinite(wide), wide, 0.0)
    _, power = np.frexp(finite)
    spacing = 2.0 ** (np.maximum(power - 1, smallest) - (significant - 1.0))
    found = np.round(finite / spacing) * spacing  # to even
    largest = (2 - 2.0 ** (1 - significant)) * 2.0 ** (127 if name == "bfloat16" else 15)
    found = np.where(np.abs(found) > largest, np.copysign(np.inf, found), found)
    return np.where(np.isfinite(wide), found, wide)


def check(encoder: str, part: int) -> None:
    """Checks one part. Averages of squares and magnitudes are not negative, and their signs are left out."""
    kind, _, how = encoder.partition(", ")
    values = numbers_of(part)
    if kind not in CODINGS:
        check_16_bits(values, kind, how, part)
    elif kind == "signed_values" or part < PARTS // 2:
        for lane in (5, 30) if how else ():  # each number is left as it is in one of the two
            check_blocks(with_larger_neighbours(values, lane), kind, part)
        if not how:
            check_blocks(values, kind, part)


def main(encoders: list[str]) -> None:
    unknown = set(encoders) - set(ENCODERS)
    if unknown:
        sys.exit(f"no such encoder: {sorted(unknown)}; there are {list(ENCODERS)}")
    with concurrent.futures.ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for encoder in encoders or ENCODERS:
            begin = time.perf_counter()
            for _ in pool.map(check, [encoder] * PARTS, range(PARTS), chunksize=16):
                pass
            print(f"{encoder}: all equal, {time.perf_counter() - begin:.0f} s on {os.cpu_count()} cores", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
