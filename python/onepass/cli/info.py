"""``python -m onepass info``: versions, the machine, and the instruction set and tuning in use."""

from __future__ import annotations

import argparse
import os
import platform

import torch

from .. import _core, _openmp
from ..training import catalog
from ..training.table import text_table


def processor() -> str:
    """Return the processor's name as reported by the operating system."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _cuda_devices() -> str:
    """Return the GPUs that torch sees; where the kernels cannot run, with the reason."""
    if not torch.cuda.is_available():
        return "none seen by torch"
    names = []
    for device in range(torch.cuda.device_count()):
        why = _core.cuda_refusal(device)
        names.append(torch.cuda.get_device_name(device) + (f" (not for our kernels: {why})" if why else ""))
    return ", ".join(names)


def facts() -> dict[str, str]:
    """Return what ``info`` prints, as a dict of texts."""
    isas = ", ".join(name + ("" if supported else " (not supported here)") for name, supported in _core.isas().items())

    def forced(variable: str) -> str:
        return f" (forced by {variable})" if os.environ.get(variable) else ""

    ahead = _core.tunings()[_core.tuning()]
    prefetch = f"prefetch {ahead} bytes ahead" if ahead else "no prefetch"
    return {
        "onepass": _core.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{processor()}, {os.cpu_count()} logical cores",
        "instruction sets": isas,
        "chosen": _core.isa() + forced("ONEPASS_ISA"),
        "tuning": f"{_core.tuning()}: {prefetch}{forced('ONEPASS_TUNING')}",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "OpenMP runtime": ", ".join(_openmp.runtimes()) or "unknown",
        "DLPack exchange API": ".".join(map(str, _core.dlpack_version())),
        "CUDA kernels": _core.cuda_built()
        or "not installed: parameters on a GPU are stepped by torch's implementation",
        "CUDA devices": _cuda_devices(),
        "kernels for": ", ".join(_core.rules()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to the parser."""
    parser.add_argument("--optimizers", action="store_true", help="print only the table of optimizers, as Markdown")


def main(args: argparse.Namespace) -> int:
    """Print the facts, or the table of optimizers."""
    if args.optimizers:
        print(catalog.markdown())
        return 0
    print(text_table(facts().items(), "<<"))
    return 0
