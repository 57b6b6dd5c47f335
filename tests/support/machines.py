"""The instruction sets and tunings that the compiled module has and this processor supports."""

import onepass

ISAS = [name for name, supported in onepass._core.isas().items() if supported]
TUNINGS = list(onepass._core.tunings())
