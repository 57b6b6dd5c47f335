"""The OpenMP runtime, which the compiled module shares with torch."""

import ctypes
import os
from typing import Any

import torch


class _Symbol(ctypes.Structure):
    """``Dl_info`` of ``dladdr``."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def runtime_of_torch() -> str:
    """Return the path of the OpenMP runtime that torch uses.

    Raises:
        ImportError: It is not found; this torch may not use OpenMP.
    """
    try:
        library = ctypes.CDLL(os.path.join(torch.__path__[0], "lib", "libtorch_cpu.so"))  # loaded already
        return library_of(library.omp_get_thread_num)  # found in the libraries that this one depends on
    except (AttributeError, OSError) as error:
        raise ImportError(f"onepass shares torch's OpenMP runtime, which was not found: {error}") from None


def library_of(function: Any) -> str:
    """Return the path of the library that contains a function of :mod:`ctypes`.

    Raises:
        OSError: No library has it.
    """
    symbol = _Symbol()
    if not ctypes.CDLL("libdl.so.2").dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(symbol)):
        raise OSError("the function is in no library")
    return os.fsdecode(symbol.path)


def share() -> None:
    """Make the functions of torch's OpenMP runtime visible to the compiled module.

    The module is not linked to an OpenMP library: a second one would have its own threads, which compete with
    torch's. torch loads its runtime for all on x86-64, but for itself alone on aarch64. A runtime that is already
    visible to all, as one in ``LD_PRELOAD``, is used instead.

    Raises:
        ImportError: torch's runtime is not found; this torch may not use OpenMP.
    """
    if not hasattr(ctypes.CDLL(None), "omp_get_thread_num"):
        ctypes.CDLL(runtime_of_torch(), mode=ctypes.RTLD_GLOBAL)


def runtimes() -> list[str]:
    """Return the paths of the OpenMP libraries in this process; more than one is a defect."""
    names = ("libgomp", "libomp", "libiomp")
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if any(f"/{n}" in line for n in names)}
    except OSError:  # not Linux
        return []
    return sorted(paths)
