"""NumPy reference of stochastic rounding: the random bits, and the rounding to 16 bits, in float64."""

import numpy as np

MASK = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15
PARAM = 4  # the stream of random bits of the parameter; a state has that of its number

# Significant bits, the exponent of the smallest normal number, and the random bits that a rounding uses.
FORMATS = {"bfloat16": (8, -126, 16), "float16": (11, -14, 13)}


def random_key(seed: int, step: int, param: int) -> int:
    """The key of a parameter's random bits in a step (SplitMix64)."""
    key = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # modulo 2^64
        for part in (seed, step, param):
            key = hash_64_bits(key + np.uint64(part + GOLDEN & MASK64))
    return int(key[0])


def hash_64_bits(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits to 64 bits (SplitMix64)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def random_32_bits(key: int, stream: int, index: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """32 random bits of each element, which two streams share. `begin` gives the upper 32 bits of the index."""
    mask, first, index64 = np.uint64(MASK), begin.astype(np.uint64), index.astype(np.uint64)
    with np.errstate(over="ignore"):  # modulo 2^64
        number = np.uint64(stream // 2) + (first >> np.uint64(32)) * np.uint64(4)
        mixed = (np.uint64(key) + number * np.uint64(GOLDEN)) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)
        product = first * np.uint64(0x9E3779B1) + mixed + (index64 - first) * np.uint64(0x9E3779B1)
    return hash_32_bits(product & mask).astype(np.int64)


def hash_32_bits(x: np.ndarray) -> np.ndarray:
    """A hash of 32 bits to 32 bits, both as uint64."""
    mask = np.uint64(MASK)
    x = x ^ x >> np.uint64(16)
    x = x * np.uint64(0x21F0AAAD) & mask
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0xD35A2D97) & mask
    return x ^ x >> np.uint64(16)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def rounded(values: np.ndarray, dtype: str, key: int, stream: int, index: np.ndarray) -> np.ndarray:
    """float32 values rounded up with a probability that is the distance from the lower number, as float64."""
    significant, smallest, width = FORMATS[dtype]
    random = random_32_bits(key, stream, index, index)
    random = (random & 0xFFFF if stream % 2 else random >> 16) >> (16 - width)
    wide = values.astype(np.float64)
    magnitude = np.where(np.abs(wide) < 2.0**-126, 0.0, np.abs(wide))  # a step flushes denormals
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    _, power = np.frexp(finite)  # finite = mantissa * 2^power, 0.5 <= mantissa < 1
    spacing = 2.0 ** (np.maximum(power - 1, smallest) - (significant - 1.0))
    steps = finite / spacing
    if dtype == "float16":  # float32 rounds the sum with 2^-14, whose last place is that of the random bits
        steps = np.where(finite < 2.0**-14, np.round(steps * 2.0**width) / 2.0**width, steps)
    found = np.floor(steps + random / 2.0**width) * spacing
    largest = (2 - 2.0 ** (1 - significant)) * 2.0 ** (127 if dtype == "bfloat16" else 15)
    found = np.where(found > largest, np.inf, found)
    return np.copysign(np.where(np.isfinite(magnitude), found, magnitude), wide)
