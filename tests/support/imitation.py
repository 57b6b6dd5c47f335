"""torch and the CUDA kernels as the core takes them, with imitations in their places.

The core is handed what it uses of torch, and may be handed something else later. The CUDA kernels are what it imports
by the name ``onepass._cuda``. So a GPU is imitated without any code for it in the core: torch's exchange API is wrapped
in one that says of tensors on the CPU that they are on a GPU, and the kernels' source is compiled for the CPU.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onepass
import torch
from onepass.optimizers import base
from torch.optim import Optimizer

ROOT = Path(__file__).parents[2]

# -- what the core has been handed -----------------------------------------------------------------------------------

_handed: list[dict[str, Any]] = [{}]


@contextlib.contextmanager
def _instead(**changed: Any) -> Iterator[None]:
    """Hands over something else, in the place of these arguments."""
    _handed.append(changed)
    base._set_torch(**changed)
    try:
        yield
    finally:
        _handed.pop()
        base._set_torch(**_handed[-1])


@contextlib.contextmanager
def _imported(module: types.ModuleType) -> Iterator[None]:
    """An import of this name gives the module. What is imported meanwhile stays: torch cannot be imported twice."""
    name, missing = module.__name__, object()
    before: Any = sys.modules.get(name, missing)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not missing:
            sys.modules[name] = before


# -- capsules --------------------------------------------------------------------------------------------------------

_EXCHANGE_API = b"dlpack_exchange_api"  # a capsule points to its name
_BACKEND = b"onepass.cuda.backend"

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _torchs_table() -> int:
    return _pointer_of(torch.Tensor.__dlpack_c_exchange_api__, _EXCHANGE_API)


# -- a torch without the borrowing export ----------------------------------------------------------------------------


class _ExchangeApi(ctypes.Structure):
    """As in csrc/bindings/dlpack_abi.h."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_python", ctypes.c_void_p),
        ("to_python", ctypes.c_void_p),
        ("borrow_from_python", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    )


@contextlib.contextmanager
def owning_export() -> Iterator[None]:
    """Tensors are read through the owning export, as of a torch that has no borrowing one."""
    table = _ExchangeApi.from_buffer_copy(_ExchangeApi.from_address(_torchs_table()))
    table.borrow_from_python = None
    with _instead(exchange_api=_new_capsule(ctypes.addressof(table), _EXCHANGE_API, None)):
        yield


# -- numbers ---------------------------------------------------------------------------------------------------------

_NUMBERS = {"step"}.union(*(scalars for _, _, scalars, *_ in onepass._core.rules().values()))

_known: dict[int, tuple[weakref.ref[torch.Tensor], bool]] = {}  # by the tensor's id


def _note(tensor: torch.Tensor, is_number: bool) -> None:
    key = id(tensor)
    _known[key] = (weakref.ref(tensor, lambda _: _known.pop(key, None)), is_number)


def _numbers_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Hyperparameters and what is kept for each parameter, where they are tensors."""
    held = [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    held += [part for value in held if isinstance(value, tuple | list) for part in value]
    held += [value for state in optimizer.state.values() for key, value in state.items() if key in _NUMBERS]
    return (value for value in held if isinstance(value, torch.Tensor))


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object)
def _is_number(tensor: torch.Tensor) -> bool:
    """Whether the optimizer that the core reads just now, which is in a frame that called it, has it as a number."""
    frame = sys._getframe(1)
    while id(tensor) not in _known and frame is not None:
        optimizer = next((value for value in frame.f_locals.values() if isinstance(value, Optimizer)), None)
        if optimizer is not None:
            _note(tensor, False)
            for number in _numbers_of(optimizer):
                _note(number, True)
        frame = frame.f_back
    return id(tensor) in _known and _known[id(tensor)][1]


# -- a GPU -----------------------------------------------------------------------------------------------------------


def compiled(folder: Path) -> ctypes.CDLL:
    """The kernels' source, and torch's exchange API on a machine with a GPU, both for the CPU.

    $ONEPASS_EMULATED, if it is set, is libonepass_emulated.so of a build of the C++ tests. It takes half a minute.
    """
    library = os.environ.get("ONEPASS_EMULATED", str(folder / "libimitation.so"))
    if "ONEPASS_EMULATED" not in os.environ:
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-DONEPASS_TARGET=emulated"]
        sources = [ROOT / "tests" / "cpp" / name for name in ("emulated.cpp", "imitated_torch.cpp")]
        subprocess.run(["c++", *flags, "-I", ROOT / "csrc", *sources, "-o", library], check=True)
    return loaded(library)


def loaded(library: str) -> ctypes.CDLL:
    """Load the library that `compiled` has compiled. Other processes can do so, too."""
    functions = ctypes.CDLL(library)
    functions.onepass_emulated_backend.restype = ctypes.c_void_p
    functions.onepass_imitated_torch.restype = ctypes.c_void_p
    functions.onepass_imitated_torch.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    return functions


@contextlib.contextmanager
def gpu(
    library: ctypes.CDLL, numbers_too: bool, name: str = "onepass._cuda", version: str = onepass.__version__
) -> Iterator[None]:
    """Tensors are on a GPU: all of them, or all but the numbers that an optimizer has.

    The kernels are in a module of this name, which has this version.
    """
    tells_numbers = None if numbers_too else ctypes.cast(_is_number, ctypes.c_void_p)
    table = library.onepass_imitated_torch(_torchs_table(), tells_numbers)
    kernels = types.ModuleType(name)
    kernels.version = version  # type: ignore[attr-defined]
    kernels.backend = _new_capsule(library.onepass_emulated_backend(), _BACKEND, None)  # type: ignore[attr-defined]
    with (
        _imported(kernels),
        _instead(
            exchange_api=_new_capsule(table, _EXCHANGE_API, None),
            workspace=lambda size, cuda: torch.empty(size, dtype=torch.uint8),
            current_device=lambda: 0,
            set_device=None,
        ),
    ):
        yield
