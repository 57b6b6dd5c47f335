"""The kernels of a GPU give the CPU's bits, whatever is stepped and wherever its steps are counted.

Each test runs on an imitation (the kernels' source, compiled for the CPU, behind the same functions) and, where there
is one, on a GPU. What needs a real one is at the end.
"""

import contextlib
import copy
import ctypes
import io
import math
import pickle
import subprocess
import sys
import types
import unittest.mock

import imitation
import numpy as np
import onepass
import pytest
import torch
from cases import (
    ALONE,
    CASES,
    ELEMENTWISE,
    OWN_CASES,
    ROW,
    copies,
    for_rows,
    give,
    gradients,
    model,
)
from onepass.optimizers import block_states
from onepass.swa_utils import AveragedModel
from reference import bits, only_kernels, params_of

pytestmark = pytest.mark.slow  # the imitation takes half a minute to compile
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: not run")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_row = for_rows(ALONE)
each_case_and_own_case = pytest.mark.parametrize(
    ("row", "kwargs"),
    [case for case in CASES + OWN_CASES if case.values[0] in ALONE and not case.values[1].get("cautious")],
)
each_capturable = for_rows(row for row in ALONE if "capturable" in row.arguments)
each_capturable_or_summed = for_rows(row for row in ELEMENTWISE if "capturable" in row.arguments)
# Without those that wait, because a number of theirs is on the CPU.
each_row_or_summed = for_rows(row for row in ELEMENTWISE if row.name != "Prodigy" and not row.wants_sparse)


class Machine:
    """A GPU, or the imitation of one."""

    def __init__(self, device: str, imitated: ctypes.CDLL | None) -> None:
        self.device, self.imitated = device, imitated

    @property
    def is_real(self) -> bool:
        return self.imitated is None

    @contextlib.contextmanager
    def on(self, numbers_too: bool = False):
        """Tensors on `self.device` are on a GPU; on an imitated one numbers are only if said so."""
        with contextlib.nullcontext() if self.imitated is None else imitation.gpu(self.imitated, numbers_too):
            yield

    def put(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the GPU, with strides and offsets as they are."""
        if not self.is_real:
            return copies(params)
        return [p.detach().to(self.device).requires_grad_() for p in params]


@pytest.fixture(params=["imitated", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
def gpu(request):
    if request.param == "cuda":
        return Machine("cuda", None)
    return Machine("cpu", request.getfixturevalue("imitated"))


def everything(row, optimizer) -> list[bytes | None]:
    """Bits of all parameters, states and numbers."""
    held = []
    for p in params_of(optimizer):
        state = optimizer.state.get(p, {})
        held.append(bits(p.detach().cpu()))
        held += [bits(state[name].cpu()) if name in state else None for name in (*row.scalars, *row.states)]
    return held


def train(optimizer, params, steps=range(1, 8)) -> None:
    """Steps with gradients that depend on the number of the step alone; `params` are those they are drawn for."""
    for step in steps:
        torch.manual_seed(step)
        give(
            optimizer,
            [
                None if g is None else g.to(p.device)
                for g, p in zip(gradients(params, step), params_of(optimizer), strict=True)
            ],
        )
        optimizer.step()


def both(gpu, row, params, kwargs, numbers_too=False, **only_there):
    """One optimizer trained on the CPU and one on the GPU, by kernels alone."""
    here = row.ours(copies(params), **copy.deepcopy(kwargs))
    there = row.ours(gpu.put(params), **copy.deepcopy(kwargs), **only_there)
    train(here, params)
    with gpu.on(numbers_too), only_kernels():
        before = onepass.stats()["kernel"]
        train(there, params)
        assert onepass.stats()["kernel"]["cpu"] == before["cpu"]
    return here, there


# -- the imitation ---------------------------------------------------------------------------------------------------


def test_an_imitated_gpu_and_what_is_on_it(imitated):
    p = torch.tensor(1.5, requires_grad=True)
    optimizer = onepass.NAdam([p], lr=torch.tensor([0.1]))
    train(optimizer, [p], [1])
    tensors = {"p": p, "grad": p.grad, "lr": optimizer.param_groups[0]["lr"], **optimizer.state[p]}
    numbers = {"lr", "step", "mu_product"}
    built = onepass._core.cuda_built()

    def on_gpu():
        return {name for name, tensor in tensors.items() if onepass._core.cuda_device(tensor) == 0}

    assert on_gpu() == set()
    with imitation.gpu(imitated, numbers_too=False):
        assert onepass._core.cuda_built() == "an imitation on the CPU"
        assert on_gpu() == set(tensors) - numbers
        with imitation.gpu(imitated, numbers_too=True):
            assert on_gpu() == set(tensors)
        assert on_gpu() == set(tensors) - numbers
    assert on_gpu() == set()
    assert onepass._core.cuda_built() == built


# -- numbers ---------------------------------------------------------------------------------------------------------


@each_dtype
@each_case_and_own_case
def test_every_case(gpu, row, kwargs, dtype):
    here, there = both(gpu, row, model(dtype), kwargs)
    assert everything(row, there) == everything(row, here)


@each_dtype
@each_capturable
def test_counted_on_the_gpu(gpu, row, dtype):
    """Steps, the constants that follow from them, and all other numbers of a parameter."""
    here, there = both(gpu, row, model(dtype), row.full, numbers_too=True, capturable=True)
    for p, q in zip(params_of(here), params_of(there), strict=True):
        for name in row.scalars:
            assert there.state[q][name].device == q.device
            assert there.state[q][name].dtype == here.state[p][name].dtype
    if not gpu.is_real:
        assert everything(row, there) == everything(row, here)
        return
    # A GPU's powers may be another rounding of the exact ones: so may be the constants.
    for p, q in zip(params_of(here), params_of(there), strict=True):
        assert torch.equal(there.state[q]["step"].cpu(), here.state[p]["step"])
    compare(row, here, there)


def compare(row, here, there):
    """Elements and numbers, within a few roundings."""
    for p, q in zip(params_of(here), params_of(there), strict=True):
        for name in (None, *row.scalars, *row.states):
            if name is not None and name not in here.state[p]:
                assert name not in there.state[q]
                continue
            mine, theirs = (p, q) if name is None else (here.state[p][name], there.state[q][name])
            # RAdam's rectification magnifies a rounding of beta2^t some hundred times while it is young.
            eps = torch.finfo(mine.dtype).eps * (128 if mine.dtype == torch.float64 else 16)
            torch.testing.assert_close(theirs.detach().cpu(), mine.detach(), rtol=eps, atol=eps)


@each_dtype
@pytest.mark.parametrize(
    ("row", "kwargs"),
    [case for case in CASES + OWN_CASES if case.values[0].sums or case.values[1].get("cautious")],
)
def test_sums_over_tensors(gpu, row, kwargs, dtype):
    """They are added in another order than on the CPU."""
    here, there = both(gpu, row, model(dtype), kwargs, numbers_too=counted_there(row))
    compare(row, here, there)


def counted_there(row) -> bool:
    """Whether the numbers of a parameter are on its GPU without having been asked for."""
    optimizer = row.ours([torch.zeros(1)], **row.full)
    return optimizer._counts_on_device(optimizer.param_groups[0])


def compare_rounded(gpu, here, there):
    """All bits; on a real GPU, where sums have other last bits, parameters that these may round otherwise."""
    if not gpu.is_real:
        assert all_bits(there) == all_bits(here)
        return
    for p, q in zip(params_of(here), params_of(there), strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@for_rows(row for row in ELEMENTWISE if row.sums)
def test_sums_beside_stochastic_rounding(gpu, row, dtype):
    """Both need words of their own in a row, and the constants that sums complete."""
    params = [*rows_of_blocks(dtype), *with_scalars_and_short_rows(dtype)]
    kwargs = {**row.full, "state_dtype": torch.bfloat16, "stochastic_rounding": True, "rounding_seed": 5}
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs)
    train_alike(gpu, here, there, params, numbers_too=counted_there(row))
    compare_rounded(gpu, here, there)


@pytest.mark.parametrize("name", ["NovoGrad", "Prodigy"])
def test_what_sums_set_has_to_be_on_the_gpu(gpu, name):
    """Else torch operations step the parameter, and the reason is told."""
    if gpu.is_real:
        pytest.skip("there it is")
    optimizer = ROW[name].ours(model()[:2], **ROW[name].full)
    train(optimizer, model()[:2], [1])
    with gpu.on(numbers_too=False):
        reasons = {row.reason for row in onepass.explain(optimizer)}
        train(optimizer, model()[:2], [2])
    assert reasons == {f"state {ROW[name].scalars[1]} that is not on the GPU"}


def test_a_divisor_of_zero_is_an_error_there_too(gpu):
    p = gpu.put([torch.ones(3).requires_grad_()])[0]
    optimizer = onepass.LAMB([p])
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)
    p.grad = torch.ones_like(p)
    with gpu.on(), pytest.raises(ZeroDivisionError, match="parameter 0 of group 0"):
        optimizer.step()
    assert torch.equal(p.detach().cpu(), torch.ones(3))


@each_dtype
@for_rows(row for row in ELEMENTWISE if row.sums and "capturable" in row.arguments)
def test_sums_over_tensors_counted_on_the_gpu(gpu, row, dtype):
    here, there = both(gpu, row, model(dtype), row.full, numbers_too=True, capturable=True)
    for q in params_of(there):
        assert {there.state[q][name].device for name in row.scalars} == {q.device}
    compare(row, here, there)


@each_dtype
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_row
def test_state_dtypes(gpu, row, state_dtype, dtype):
    here, there = both(gpu, row, model(dtype), {**row.full, "state_dtype": state_dtype})
    assert everything(row, there) == everything(row, here)


# -- 8-bit states ----------------------------------------------------------------------------------------------------

IN_8_BITS = [row for row in ALONE if block_states.has_codings(row.ours.rule)]
each_8bit_row = for_rows(IN_8_BITS)


def rows_of_blocks(dtype):
    """Whole blocks; rows with tails; rows shorter than a block; other orders of dimensions; gaps; misaligned."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(64, 128), (70, 77), (600, 9), (40, 3, 7, 7), (1, 5000), (4096, 1), (40, 1024), (30,), (0, 5000)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params.append(torch.randn(24, 16, 5, 7, generator=generator).to(memory_format=torch.channels_last))
    params.append(torch.randn(128, 64, generator=generator).t())
    params.append(torch.randn(64, 200, generator=generator)[:, 3:103])
    params = [p.to(dtype) for p in params]
    params.append(torch.randn(64 * 128 + 1, generator=generator).to(dtype)[1:].view(64, 128))
    return [p.requires_grad_() for p in params]


def all_bits(optimizer):
    """Bits of all parameters and of all that their states hold."""
    found = []
    for p in params_of(optimizer):
        found.append(bits(p.detach().cpu()))
        for name, value in sorted(optimizer.state.get(p, {}).items()):
            if isinstance(value, torch.Tensor):
                found.append(bits((value.view(torch.uint8) if value.element_size() == 1 else value).cpu()))
                found.append(f"{name} {value.dtype} {tuple(value.shape)} {value.stride()}")
    return found


def train_alike(gpu, here, there, params, steps=range(1, 5), numbers_too=False):
    for step in steps:
        for optimizer in (here, there):
            torch.manual_seed(step)
            device = "cpu" if optimizer is here else gpu.device
            give(optimizer, [torch.randn(p.shape).to(p.dtype).to(device) for p in params])
        here.step()
        with gpu.on(numbers_too), only_kernels():
            there.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_8bit_row
def test_8bit_states(gpu, row, dtype):
    params = rows_of_blocks(dtype)
    kwargs = {**row.full, "state_dtype": torch.float8_e4m3fn, "rounding_seed": 5}
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs)
    train_alike(gpu, here, there, params)
    assert all_bits(there) == all_bits(here)


@for_rows(row for row in IN_8_BITS if onepass._core.rules()[row.ours.rule][3])
def test_8bit_states_counted_on_the_gpu(gpu, row):
    """The random bits follow the count on the GPU. Its constants may differ in the last place on a real one."""
    params = rows_of_blocks(torch.float32)
    kwargs = {**row.full, "state_dtype": torch.float8_e4m3fn}
    flags = row.having(capturable=True)
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs, **flags)
    train_alike(gpu, here, there, params, numbers_too=True)
    if not gpu.is_real:
        assert all_bits(there) == all_bits(here)
        return
    for p, q in zip(params_of(here), params_of(there), strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-3, atol=1e-3)
        for name, value in there.state[q].items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn:
                a, b = (x.view(torch.uint8).cpu() for x in (value, here.state[p][name]))
                # Another random number would round half of the codes otherwise.
                assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("row", "kwargs"),
    [
        case
        for case in CASES + OWN_CASES
        if block_states.has_codings(case.values[0].ours.rule)
        and (case.values[0].sums or case.values[1].get("cautious"))
    ],
)
def test_8bit_states_beside_sums(gpu, row, kwargs, dtype):
    """The sums are over the states that the codes stand for."""
    params = rows_of_blocks(dtype)
    kwargs = {**kwargs, "state_dtype": torch.float8_e4m3fn, "rounding_seed": 5}
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs)
    train_alike(gpu, here, there, params, numbers_too=counted_there(row))
    compare_rounded(gpu, here, there)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("master", ["split", "float32"])
def test_8bit_states_with_everything(gpu, master, cautious):
    """Masters, an average, a copy, a clamp, zeroed gradients and a skipped step."""
    row = next(row for row in IN_8_BITS if row.name == "AdamW")
    params = rows_of_blocks(torch.bfloat16)

    def made(own):
        net = torch.nn.ParameterList(own)
        average = AveragedModel(net, decay=0.9)
        low = [p.detach().to(torch.float16) for p in net]
        kwargs = {"average": average, "copy_to": low, "clip_value": 0.5, "zero_grad": True, "master": master}
        kwargs |= {"cautious": cautious, "state_dtype": torch.float8_e4m3fn}
        return row.ours(net, **row.full, **kwargs), average, low

    (here, own_average, own_low), (there, average, low) = made(copies(params)), made(gpu.put(params))
    train_alike(gpu, here, there, params)
    assert all_bits(there) == all_bits(here)
    assert [bits(p.cpu()) for p in low] == [bits(p) for p in own_low]
    assert [bits(p.detach().cpu()) for p in average.module] == [bits(p.detach()) for p in own_average.module]
    assert not any(p.grad.count_nonzero() for p in params_of(there))


@each_8bit_row
def test_8bit_states_of_numbers_that_are_not_finite(gpu, row):
    params = rows_of_blocks(torch.float32)[:4]
    kwargs = {**row.full, "state_dtype": torch.float8_e4m3fn}
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs)
    for optimizer in (here, there):
        give(
            optimizer, [torch.ones(p.shape, device=q.device) for p, q in zip(params, params_of(optimizer), strict=True)]
        )
        for number, bad in enumerate([math.nan, math.inf, -math.inf, 3e38]):
            params_of(optimizer)[number].grad[2] = bad
    here.step()
    with gpu.on(), only_kernels():
        there.step()
    for p, q in zip(params_of(here), params_of(there), strict=True):
        for name, value in here.state[p].items():
            if isinstance(value, torch.Tensor) and value.element_size() == 1:
                assert torch.equal(there.state[q][name].view(torch.uint8).cpu(), value.view(torch.uint8))


# -- stochastic rounding to 16 bits ----------------------------------------------------------------------------------


def with_scalars_and_short_rows(dtype):
    generator = torch.Generator().manual_seed(4)
    shapes = [(), (1,), (3,), (31,), (33, 5), (1023,), (4099,), (2, 0)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "states"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.complex64, torch.bfloat16),
    ],
    ids=str,
)
@each_row
def test_stochastic_rounding(gpu, row, dtype, states):
    params = [*rows_of_blocks(dtype), *with_scalars_and_short_rows(dtype)]
    kwargs = {**row.full, "state_dtype": states, "stochastic_rounding": True, "rounding_seed": 5}
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs)
    train_alike(gpu, here, there, params)
    assert all_bits(there) == all_bits(here)


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_random_bits_beside_float64_are_left_to_torch(gpu, states):
    """No kernel of a GPU rounds the states of a float64 parameter, which is found out when they have been created."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).double()
    (p,) = gpu.put([start.clone().requires_grad_()])
    optimizer = onepass.AdamW([p], state_dtype=states, stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    for _ in range(2):
        with gpu.on():
            result = optimizer._plan.step(optimizer, onepass._core.StepRequest(1.0, 1))
        assert not result.stepped
        assert result.fallback == [(0, 0, "stochastic rounding beside a float64 parameter on a GPU")]
        assert torch.equal(p.detach().cpu(), start)
        assert not optimizer.state  # torch's implementation creates its own


def test_a_second_request_names_what_new_states_leave_to_torch(gpu):
    """torch's implementation has stepped the first parameters, and has to step another because of its states."""
    (memory,) = gpu.put([torch.ones(64)])
    shared = [memory[:40].detach().requires_grad_(), memory[24:].detach().requires_grad_()]
    (wide,) = gpu.put([torch.ones(64, 128).double().requires_grad_()])
    optimizer = onepass.AdamW([*shared, wide], state_dtype=torch.bfloat16, stochastic_rounding=True)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    found = []
    for fallback_stepped in (False, True):
        request = onepass._core.StepRequest(1.0, 1, fallback_stepped=fallback_stepped)
        with gpu.on():
            result = optimizer._plan.step(optimizer, request)
        assert not result.stepped
        found.append([index for _, index, _ in result.fallback])
    assert found == [[0, 1], [2]]
    assert wide not in optimizer.state


@each_8bit_row
def test_stochastic_rounding_beside_8_bit_states(gpu, row):
    params = [*rows_of_blocks(torch.bfloat16), *with_scalars_and_short_rows(torch.bfloat16)]
    kwargs = {**row.full, "state_dtype": torch.float8_e4m3fn, "stochastic_rounding": True}
    here, there = row.ours(copies(params), **kwargs), row.ours(gpu.put(params), **kwargs)
    train_alike(gpu, here, there, params)
    assert all_bits(there) == all_bits(here)


@pytest.mark.parametrize("master", [None, "split", "float32"])
def test_stochastic_rounding_with_everything(gpu, master):
    row = next(row for row in ALONE if row.name == "AdamW")
    params = [*rows_of_blocks(torch.bfloat16), *with_scalars_and_short_rows(torch.bfloat16)]

    def made(own):
        net = torch.nn.ParameterList(own)
        average = AveragedModel(net, decay=0.9)
        low = [p.detach().to(torch.float16) for p in net]
        kwargs = {"average": average, "copy_to": low, "clip_value": 0.5, "zero_grad": True, "master": master}
        return row.ours(net, **row.full, state_dtype=torch.bfloat16, stochastic_rounding=True, **kwargs), average, low

    (here, own_average, own_low), (there, average, low) = made(copies(params)), made(gpu.put(params))
    train_alike(gpu, here, there, params)
    assert all_bits(there) == all_bits(here)
    assert [bits(p.cpu()) for p in low] == [bits(p) for p in own_low]
    assert [bits(p.detach().cpu()) for p in average.module] == [bits(p.detach()) for p in own_average.module]


@each_row
def test_sizes(gpu, row):
    """Around the ends of vectors and chunks, and nothing at all."""
    sizes = [0, *range(1, 10), 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8193, 70_001]
    params = [torch.randn(n).to(dtype).requires_grad_() for n in sizes for dtype in (torch.float32, torch.bfloat16)]
    here, there = both(gpu, row, params, row.full)
    assert everything(row, there) == everything(row, here)


def layouts(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters of 6 x 10 numbers (or as many as these), in all manners of lying in memory."""

    def base(*shape):
        return torch.zeros(shape, dtype=dtype, device=device)

    return [
        base(6, 10),
        base(10, 6).t(),
        base(6, 20)[:, ::2],
        base(7, 10)[1:],
        base(61)[1:].view(6, 10),
        base(62)[2:].view(6, 10),
        base(63)[3:].view(6, 10),
        base(2, 3, 5, 2).to(memory_format=torch.channels_last),
        base(5, 2, 6).permute(2, 0, 1),
        base(1, 6, 1, 10),
    ]


@each_dtype
@each_row
def test_layouts(gpu, row, dtype):
    """Each layout of a parameter beside each layout of its gradient, its states as torch makes them."""

    def made(device):
        params = []
        for number, like in enumerate(layouts(device, dtype)):
            torch.manual_seed(number)
            values = torch.randn(like.shape).to(dtype)
            for k in range(len(layouts("cpu", dtype))):
                p = layouts(device, dtype)[number]
                p.copy_(values)
                params.append((p.requires_grad_(), k))
        return params

    def stepped(device):
        params = made(device)
        optimizer = row.ours([p for p, _ in params], **row.full)
        for step in range(1, 5):
            torch.manual_seed(step)
            for p, k in params:
                values = torch.randn(60).to(dtype)
                grad = layouts(device, dtype)[k]
                fits = grad.shape == p.shape
                grad = grad if fits else torch.zeros(p.shape, dtype=dtype, device=device)
                grad.copy_(values.view(p.shape))
                p.grad = grad
            optimizer.step()
        return optimizer

    here = stepped("cpu")
    with gpu.on(), only_kernels():
        there = stepped(gpu.device)
    assert everything(row, there) == everything(row, here)


@each_row
def test_groups(gpu, row):
    """Groups of all variants and dtypes in one step, 3,000 tensors: more than one launch has room for."""
    settings = [kw for kw in row.variants.values() if not row.eager or "initial_accumulator_value" not in kw]
    settings = [kw for kw in settings if not any(isinstance(v, torch.Tensor) for v in kw.values())]
    settings = [kw for kw in settings if not any(isinstance(b, torch.Tensor) for b in kw.get("betas", ()))]
    count = 3000 // len(settings)

    def stepped(put):
        torch.manual_seed(0)
        groups = []
        for number, kwargs in enumerate(settings):
            dtype = DTYPES[number % 4]
            groups.append({"params": put([torch.randn(7).to(dtype).requires_grad_() for _ in range(count)]), **kwargs})
        optimizer = row.ours(groups)
        for step in range(1, 3):
            torch.manual_seed(step)
            params = params_of(optimizer)
            for p, grad in zip(params, torch.randn(len(params), 7), strict=True):
                p.grad = grad.to(p.dtype).to(p.device)
            optimizer.step()
        return optimizer

    here = stepped(copies)
    with gpu.on(), only_kernels():
        there = stepped(gpu.put)
    assert everything(row, there) == everything(row, here)


@each_row
def test_lookahead(gpu, row):
    def stepped(put):
        optimizer = onepass.Lookahead(row.ours(put(params), **row.full), k=2, alpha=0.3)
        train(optimizer, params)
        return optimizer.optimizer

    params = model()
    here = stepped(copies)
    with gpu.on(), only_kernels():
        there = stepped(gpu.put)
    assert everything(row, there) == everything(row, here)
    for p, q in zip(params_of(here), params_of(there), strict=True):
        assert bits(here.state[p]["slow_param"]) == bits(there.state[q]["slow_param"].cpu())


def test_complex_and_negated(gpu):
    """Complex numbers as pairs; a gradient that torch negates or conjugates lazily."""
    params = [torch.randn(5, 3, dtype=torch.complex64).requires_grad_() for _ in range(3)]

    def stepped(put):
        optimizer = onepass.AdamW(put(params), lr=0.01)
        for step in range(1, 5):
            torch.manual_seed(step)
            for p, lazy in zip(params_of(optimizer), (lambda g: g, torch.conj, torch._neg_view), strict=True):
                p.grad = lazy(torch.randn(5, 3, dtype=torch.complex64).to(p.device))
            optimizer.step()
        return optimizer

    here = stepped(copies)
    with gpu.on(), only_kernels():
        there = stepped(gpu.put)
    assert everything(ROW["AdamW"], there) == everything(ROW["AdamW"], here)


def test_muon(gpu):
    """Its element-wise parts are kernels, the matrix products between them torch's."""
    params = [torch.randn(12, 8).requires_grad_(), torch.randn(3, 20).requires_grad_()]
    here, there = onepass.Muon(copies(params), lr=0.02), onepass.Muon(gpu.put(params), lr=0.02)
    train(here, params)
    with gpu.on(), only_kernels():
        train(there, params)
    for p, q in zip(params_of(here), params_of(there), strict=True):
        assert bits(here.state[p]["momentum_buffer"]) == bits(there.state[q]["momentum_buffer"].cpu())
        tolerance = 0.03 if gpu.is_real else 0.0  # of bfloat16 products, in another order
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=0, atol=tolerance)


# -- the tail of a step ----------------------------------------------------------------------------------------------

NORMS = pytest.mark.parametrize("norm_type", [2.0, math.inf])


def norm_of(grads, norm_type) -> float:
    """In float64 the norm of all elements."""
    flat = torch.cat([torch.zeros(1, dtype=torch.float64), *(g.double().reshape(-1) for g in grads if g is not None)])
    return torch.linalg.vector_norm(flat, ord=norm_type).item()


def clipped(grad, p, coefficient, limit=math.inf):
    """The gradient as a step uses it: in the step's arithmetic."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    return (grad.to(wide) * torch.tensor(coefficient, dtype=wide)).clamp(-limit, limit)


def bare_of(row, params):
    """An optimizer whose gradients may have another dtype than its parameters; its states have the parameters'."""
    optimizer = row.ours(params, **row.full)
    new_state = optimizer._new_state
    optimizer._new_state = lambda group, p, grad, name: new_state(group, p, grad.to(p.dtype), name)
    for p in params:
        p.grad_dtype = None
    return optimizer


def is_left_on_the_gpu(optimizer) -> bool:
    """Whether the last step has not waited for the norm."""
    return optimizer._tail._device_clipping is not None


@NORMS
@each_dtype
@each_row
def test_tail(gpu, row, dtype, norm_type):
    """Clipped by norm and by value, averaged, copied and zeroed; the bare step on the CPU gets clipped gradients."""
    params = model(dtype)
    net = torch.nn.ParameterList(gpu.put(params))
    here, there = bare_of(row, copies(params)), list(net)
    average = AveragedModel(net, decay=0.75)
    average.update_parameters(net)
    half = torch.bfloat16 if dtype == torch.float32 else torch.float32
    low = [p.detach().to(half) for p in there]
    wanted_low = [p.detach().to(half) for p in params]
    optimizer = row.ours(
        there,
        **row.full,
        max_norm=3.0,
        norm_type=norm_type,
        clip_value=0.1,
        average=average,
        copy_to=low,
        zero_grad=True,
    )
    averages = [p.detach().to(torch.float64).cpu() for p in average.module.parameters()]
    for step in range(1, 5):
        torch.manual_seed(step)
        grads = gradients(params, step)
        give(optimizer, [None if g is None else g.to(gpu.device) for g in grads])
        with gpu.on(numbers_too=True), only_kernels():
            optimizer.step()
        average.update_parameters(net)
        assert is_left_on_the_gpu(optimizer)
        report = optimizer.last_step
        assert report.grad_norm == pytest.approx(norm_of(grads, norm_type), rel=1e-12)
        assert report.coefficient == pytest.approx(min(1.0, 3.0 / (report.grad_norm + 1e-6)), rel=1e-15)
        assert not report.skipped
        for i, (p, grad) in enumerate(zip(params_of(here), grads, strict=True)):
            p.grad = None if grad is None else clipped(grad, p, report.coefficient, 0.1)
            if grad is not None:
                assert not there[i].grad.cpu().count_nonzero()
        here.step()
        for i, p in enumerate(params_of(here)):
            averages[i] += 0.25 * (p.detach().double() - averages[i])
            wanted_low[i] = p.detach().to(half)
    assert everything(row, optimizer) == everything(row, here)
    assert [bits(p.cpu()) for p in low] == [bits(p) for p in wanted_low]
    for mine, wanted in zip(average.module.parameters(), averages, strict=True):
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.detach().double().cpu(), wanted, rtol=8 * eps, atol=8 * eps)


def counts_on_the_gpu(optimizer, gpu) -> bool:
    """Whether no step is counted on the CPU; Adagrad has no argument that moves its counts to a GPU."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return all(count.device.type == gpu.device for count in counts)


def has_states(optimizer) -> bool:
    """Whether no parameter with a gradient lacked a state in the last step."""
    return all(p.grad is None or p in optimizer.state for p in params_of(optimizer))


@NORMS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@each_row
def test_a_step_that_is_skipped(gpu, row, bad, norm_type):
    """Wherever steps are counted, nothing is changed and nothing counted; gradients are zeroed."""
    params = model()
    flags = row.having(capturable=True)
    skipping = row.ours(gpu.put(params), **row.full, **flags, skip_nonfinite=True, norm_type=norm_type, zero_grad=True)
    plain = row.ours(gpu.put(params), **row.full, **flags)
    for step in range(1, 6):
        torch.manual_seed(step)
        grads = [None if g is None else g.to(gpu.device) for g in gradients(params, step)]
        give(plain, grads)
        give(skipping, grads)
        skips = step in (1, 4)
        if skips:
            last = [p.grad for p in params_of(skipping) if p.grad is not None][-1]
            last[(-1,) * last.ndim] = bad
        with gpu.on(numbers_too=True):
            before = everything(row, skipping)
            skipping.step()
            if not skips:
                with only_kernels():
                    plain.step()
        # In the first two steps states are missing, unless they were created with the optimizer.
        complete = row.eager or (step > 2 and has_states(skipping))
        assert is_left_on_the_gpu(skipping) == (complete and counts_on_the_gpu(skipping, gpu))
        assert skipping.last_step.skipped == skips
        if skips:
            assert everything(row, skipping) == before
            assert skipping.last_step.reason == f"the gradients' norm is {'nan' if math.isnan(bad) else 'inf'}"
        for p in params_of(skipping):
            assert p.grad is None or not p.grad.cpu().count_nonzero()
    assert everything(row, skipping) == everything(row, plain)


@for_rows(row for row in ELEMENTWISE if "capturable" in row.arguments or not (row.counts_steps or row.wants_sparse))
def test_tail_with_a_scaler(gpu, row):
    """The norm is that of the unscaled gradients, and what GradScaler has found skips the step."""
    params = model()
    flags = row.having(capturable=True)
    scaled = row.ours(gpu.put(params), **row.full, **flags, max_norm=3.0)
    plain = row.ours(gpu.put(params), **row.full, **flags, max_norm=3.0)
    for step, (factor, bad) in enumerate([(1.0, False), (1024.0, False), (8.0, True), (0.5, False)], 1):
        torch.manual_seed(step)
        grads = [None if g is None else g.to(gpu.device) for g in gradients(params, step)]
        give(plain, grads)
        give(scaled, [None if g is None else g * factor for g in grads])
        scaled.grad_scale = torch.tensor(factor, device=gpu.device)
        scaled.found_inf = torch.tensor(float(bad), device=gpu.device)
        with gpu.on(numbers_too=True), only_kernels(), contextlib.ExitStack() as patched:
            if step > 2:  # in the first two steps states may be missing
                patched.enter_context(unittest.mock.patch.object(scaled, "_grad_factor", side_effect=AssertionError))
            scaled.step()
            if not bad:
                plain.step()
        assert is_left_on_the_gpu(scaled) or not is_left_on_the_gpu(plain)
        if bad:
            assert scaled.last_step == onepass.StepReport(
                skipped=True, reason="GradScaler has found an infinite or NaN gradient"
            )
        else:
            assert scaled.last_step == plain.last_step
    assert everything(row, scaled) == everything(row, plain)


def test_a_policy_is_asked_for_the_coefficient(gpu):
    params = model()
    asked = []

    class Policy(onepass.ClippingPolicy):
        def coefficient(self, norm):
            asked.append(norm)
            return 0.5

    here = onepass.AdamW(copies(params), max_norm=Policy())
    there = onepass.AdamW(gpu.put(params), max_norm=Policy())
    train(here, params)
    with gpu.on(), only_kernels():
        train(there, params)
    assert not is_left_on_the_gpu(there)
    assert asked[7:] == pytest.approx(asked[:7], rel=1e-12)
    assert everything(ROW["AdamW"], there) == everything(ROW["AdamW"], here)


def test_the_report_outlives_copies_and_pickles(gpu):
    params = gpu.put(model())
    optimizer = onepass.AdamW(params, max_norm=1.0)
    with gpu.on():
        train(optimizer, params, [1])
    assert is_left_on_the_gpu(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not is_left_on_the_gpu(other)
        assert other.last_step == optimizer.last_step


def test_lookahead_of_a_clipped_step_does_not_wait(gpu, monkeypatch):
    params = model()
    here = onepass.Lookahead(onepass.AdamW(copies(params), max_norm=1.0), k=2)
    there = onepass.Lookahead(onepass.AdamW(gpu.put(params), max_norm=1.0), k=2)
    train(here, params)
    with gpu.on(), only_kernels(), monkeypatch.context() as patched:
        patched.setattr(type(there.optimizer._tail), "report", None)  # reading it would fail
        train(there, params)
    assert there.last_step.grad_norm == pytest.approx(here.last_step.grad_norm, rel=1e-12)
    for p, q in zip(params_of(here), params_of(there), strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_aligned_is_not_measured(gpu):
    """Also in the first step, when states are missing."""
    if gpu.is_real:
        pytest.skip("torch makes no such tensor on a GPU: not run")
    raw = torch.zeros(4 * 5 + 1, dtype=torch.uint8)
    p = torch.ones(5, requires_grad=True)
    p.grad = torch.from_numpy(np.frombuffer(raw.numpy().data, np.float32, count=5, offset=1))
    optimizer = onepass.SGD([p], lr=0.1, momentum=0.9, max_norm=1.0)
    with gpu.on():
        assert [(row.path, row.reason) for row in onepass.explain(optimizer)] == [
            ("torch", "memory that is not aligned to its elements")
        ]
        optimizer.step()
    assert not is_left_on_the_gpu(optimizer)


def test_the_largest_magnitude_of_complex_gradients(gpu):
    """That of the numbers, not of their parts."""
    p = gpu.put([torch.zeros(3, dtype=torch.complex64).requires_grad_()])[0]
    optimizer = onepass.SGD([p], lr=1.0, max_norm=1.0, norm_type=math.inf)
    p.grad = torch.tensor([3 + 4j, 1, 0], dtype=torch.complex64, device=gpu.device)
    with gpu.on():
        optimizer.step()
    assert optimizer.last_step.grad_norm == 5.0


# -- hyperparameters and GradScaler's numbers on the GPU -------------------------------------------------------------


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("row", "capturable"),
    [(row, False) for row in ALONE] + [(row, True) for row in ALONE if "capturable" in row.arguments],
)
def test_lr_on_the_gpu(gpu, row, lr_dtype, capturable):
    """Read there, at every step anew, wherever steps are counted."""
    params = model()
    kwargs = {**row.full, **({"capturable": True} if capturable else {})}
    kwargs.pop("lr", None)
    schedule = [0.01, 0.02, 0.005, 0.0]
    lr = torch.tensor(schedule[0], dtype=lr_dtype, device=gpu.device)
    with gpu.on(numbers_too=True):
        there = row.ours(gpu.put(params), lr=lr, **kwargs)
    here = row.ours(
        copies(params),
        lr=float(torch.tensor(schedule[0], dtype=lr_dtype)),
        **{**kwargs, "capturable": False} if "capturable" in kwargs else kwargs,
    )
    for step, rate in enumerate(schedule, 1):
        lr.fill_(rate)
        here.param_groups[0]["lr"] = float(torch.tensor(rate, dtype=lr_dtype))
        train(here, params, [step])
        with gpu.on(numbers_too=True), only_kernels():
            train(there, params, [step])
    if gpu.is_real:
        for p, q in zip(params_of(here), params_of(there), strict=True):
            torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-6, atol=1e-7)
    else:
        assert everything(row, there) == everything(row, here)


@for_rows(row for row in ELEMENTWISE if "capturable" in row.arguments or not (row.counts_steps or row.wants_sparse))
def test_scaler_on_the_gpu(gpu, row):
    """Gradients are unscaled, and an infinite one skips the step, without anybody here looking at it."""
    on_gpu = {"capturable": True} if "capturable" in row.arguments else {}
    params = model()
    plain = row.ours(gpu.put(params), **row.full, **on_gpu)
    scaled = row.ours(gpu.put(params), **row.full, **on_gpu)

    def give_both(step, factor):
        torch.manual_seed(step)
        for p, q, grad in zip(params_of(plain), params_of(scaled), gradients(params, step), strict=True):
            p.grad = None if grad is None else grad.to(p.device)
            q.grad = None if grad is None else (grad * factor).to(q.device)

    for step, (factor, bad) in enumerate([(1.0, False), (1024.0, False), (8.0, True), (0.5, False)], 1):
        give_both(step, factor)
        scaled.grad_scale = torch.tensor(factor, device=gpu.device)
        scaled.found_inf = torch.tensor(float(bad), device=gpu.device)
        with gpu.on(numbers_too=True), only_kernels():
            before = everything(row, scaled)
            scaled.step()
            if bad:
                assert everything(row, scaled) == before
            else:
                plain.step()
    assert everything(row, scaled) == everything(row, plain)


def test_scaler_beside_steps_that_are_counted_here(gpu):
    """Then the step waits for the scaler's numbers, and is the same."""
    for bad in (False, True):
        params = model()
        plain, scaled = (onepass.AdamW(gpu.put(params), lr=0.01) for _ in range(2))
        for step in (1, 2):
            torch.manual_seed(step)
            for p, q, grad in zip(params_of(plain), params_of(scaled), gradients(params, step), strict=True):
                p.grad = None if grad is None else grad.to(p.device)
                q.grad = None if grad is None else (grad * 4).to(p.device)
            scaled.grad_scale = torch.tensor(4.0, device=gpu.device)
            scaled.found_inf = torch.tensor(float(bad and step == 2), device=gpu.device)
            with gpu.on():
                scaled.step()
                if not (bad and step == 2):
                    plain.step()
        assert everything(ROW["AdamW"], scaled) == everything(ROW["AdamW"], plain)


@pytest.mark.parametrize("bad", [False, True])
def test_scaler_beside_a_class_without_kernels_there(gpu, bad):
    p, q = gpu.put([torch.randn(4, 3).requires_grad_()] * 2)
    scaled, plain = onepass.Adafactor([p]), onepass.Adafactor([q])
    p.grad, q.grad = torch.full_like(p, 4.0), torch.full_like(q, 1.0)
    scaled.grad_scale = torch.tensor(4.0, device=gpu.device)
    scaled.found_inf = torch.tensor(float(bad), device=gpu.device)
    with gpu.on(numbers_too=True):
        scaled.step()
    if bad:
        assert not scaled.state
    else:
        plain.step()
    assert bits(p.detach().cpu()) == bits(q.detach().cpu())


# -- paths and errors ------------------------------------------------------------------------------------------------


def test_rprop_takes_a_denormal_of_a_checkpoint_for_zero(gpu):
    """torch leaves denormals in states; all processors have to read them alike."""

    def stepped(put):
        p = put([torch.randn(64).requires_grad_()])[0]
        optimizer = onepass.Rprop([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["prev"].copy_(torch.tensor([-1e-40, 1e-40] * 32))
        optimizer.step()
        return optimizer

    torch.manual_seed(0)
    here = stepped(copies)
    torch.manual_seed(0)
    with gpu.on(), only_kernels():
        there = stepped(gpu.put)
    assert everything(ROW["Rprop"], there) == everything(ROW["Rprop"], here)


@pytest.mark.parametrize("arguments", [{}, {"clip_value": 1.0}, {"max_norm": 1.0, "zero_grad": True}], ids=str)
def test_explained_and_counted(gpu, arguments):
    params = gpu.put(model())
    optimizer = onepass.AdamW(params, **arguments)
    for p in params:
        p.grad = torch.ones_like(p)
    with gpu.on():
        rows = onepass.explain(optimizer)
        assert {row.path for row in rows} == {"kernel"}
        assert {row.reason for row in rows} == {"cuda:0"}
        before = onepass.stats()["kernel"]
        optimizer.step()
    after = onepass.stats()["kernel"]
    assert after == {"cpu": before["cpu"], "cuda": before["cuda"] + len(params)}


def test_a_sparse_gradient_is_torchs(gpu):
    p = gpu.put([torch.randn(4, 3).requires_grad_()])[0]
    p.grad = torch.ones_like(p).to_sparse(1)
    optimizer = onepass.SGD([p], lr=0.1)
    with gpu.on():
        row = onepass.explain(optimizer)[0]
        assert (row.path, row.reason) == ("torch", "sparse gradient on a GPU")
        expected = p.detach() - 0.1
        optimizer.step()
    assert torch.equal(p.detach(), expected)


def test_a_state_of_the_wrong_shape_writes_nothing(gpu):
    params = gpu.put(model())
    optimizer = onepass.AdamW(params)
    with gpu.on():
        train(optimizer, params, [1])
        before = everything(ROW["AdamW"], optimizer)
        optimizer.state[params[-1]]["exp_avg"] = torch.zeros(2, 2, device=params[-1].device)
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"parameter \d+ of group 0 .*its state exp_avg has shape \[2, 2\]"):
            optimizer.step()
    after = everything(ROW["AdamW"], optimizer)
    assert [a for a, b in zip(after, before, strict=True) if a != b] == [bits(torch.zeros(2, 2))]


def test_the_module_is_loaded_only_when_it_is_needed():
    code = """
import sys, torch, onepass
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
onepass.AdamW([p]).step()
assert "onepass._cuda" not in sys.modules
import onepass._cuda  # needs neither a GPU nor a driver
assert not torch.cuda.is_initialized()
"""
    if not onepass._core.cuda_built():
        code = code[: code.index("import onepass._cuda")]
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_module():
    """onepass works as before, and says what is missing."""
    code = """
import sys
sys.modules["onepass._cuda"] = sys.modules["onepass_cuda"] = None
import onepass
from onepass.cli.info import facts
assert onepass._core.cuda_built() == ""
assert onepass._core.cuda_refusal(0).startswith("no CUDA kernels are installed: ")
assert facts()["CUDA kernels"].startswith("not installed")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kernels_may_be_a_package_of_their_own(imitated, monkeypatch):
    """Which is used if onepass has none, and has to have its version."""
    monkeypatch.setitem(sys.modules, "onepass._cuda", None)
    monkeypatch.setitem(sys.modules, "onepass_cuda", types.ModuleType("onepass_cuda"))
    name, version = "onepass_cuda._cuda", onepass.__version__
    with imitation.gpu(imitated, False, name, version):
        assert onepass._core.cuda_built() == "an imitation on the CPU"
    text = f"onepass-cuda 0.0.1 has kernels for another onepass than {version}: install onepass-cuda {version}"
    with imitation.gpu(imitated, False, name, "0.0.1"), pytest.raises(ImportError, match=text):
        onepass._core.cuda_built()


# -- a real GPU ------------------------------------------------------------------------------------------------------

real = [pytest.mark.cuda, NO_GPU]


@pytest.fixture
def cuda():
    return Machine("cuda", None)


def same(row, a, b) -> None:
    assert everything(row, a) == everything(row, b)


def captured_after_a_step(captured, plain):
    """The graph of the second step of one optimizer, after the first of both."""
    for optimizer in (captured, plain):
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    return graph


@pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:The CUDA Graph is empty")
class TestRealGpu:
    pytestmark = real

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @each_row
    def test_every_bit_pattern(self, cuda, row, dtype):
        """Denormals, infinities, NaN and all else that 16 bits can hold, as parameter and as gradient."""
        patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
        if dtype == torch.float32:
            values = (patterns << 16).view(torch.float32)
        else:
            values = patterns.to(torch.int16).view(dtype)
        shuffled = values[torch.randperm(len(values))]
        here = row.ours([values.clone().requires_grad_(), shuffled.clone().requires_grad_()], **row.full)
        there = row.ours(cuda.put(params_of(here)), **row.full)
        for p, q, grad in zip(params_of(here), params_of(there), (shuffled, values), strict=True):
            p.grad, q.grad = grad, grad.to("cuda")
        for _ in range(3):
            here.step()
            there.step()
        for p, q in zip(params_of(here), params_of(there), strict=True):
            for mine, theirs in [(p, q), *[(here.state[p][n], there.state[q][n]) for n in row.states]]:
                mine, theirs = mine.detach(), theirs.detach().cpu()
                assert torch.equal(mine.isnan(), theirs.isnan())
                known = ~mine.isnan()
                assert bits(mine[known]) == bits(theirs[known])

    @pytest.mark.parametrize("flags", [{}, {"fused": True}, {"capturable": True}], ids=str)
    @each_row_or_summed
    def test_no_synchronization(self, cuda, row, flags):
        """Neither by torch nor by a copy that waits."""
        optimizer = row.ours(cuda.put(model()), **row.full, **row.having(**flags))
        train(optimizer, model(), [1])
        torch.cuda.synchronize()
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @each_row_or_summed
    def test_no_synchronization_for_the_norm(self, cuda, row):
        """Neither to clip by it nor, where steps are counted on the GPU, to skip the step."""
        for arguments in ({"max_norm": 1.0, "zero_grad": True}, {"max_norm": 1.0, "skip_nonfinite": True}):
            flags = row.having(capturable=True)
            if row.counts_steps and not flags and "skip_nonfinite" in arguments:
                continue
            optimizer = row.ours(cuda.put(model()), **row.full, **flags, **arguments)
            train(optimizer, model(), [1])
            for p in params_of(optimizer):
                p.grad = torch.ones_like(p)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert optimizer.last_step.coefficient < 1.0

    @each_capturable_or_summed
    def test_graph_of_a_clipped_step(self, cuda, row):
        """Each replay measures the gradients that are there then."""
        params = model()
        captured, plain = (row.ours(cuda.put(params), **row.full, capturable=True, max_norm=3.0) for _ in range(2))
        graph = captured_after_a_step(captured, plain)
        for step in range(3):
            for p, q in zip(params_of(captured), params_of(plain), strict=True):
                p.grad.fill_(0.5 + step)
                q.grad.fill_(0.5 + step)
            graph.replay()
            plain.step()
            assert captured.last_step == plain.last_step
        same(row, captured, plain)

    @each_capturable_or_summed
    def test_graph(self, cuda, row):
        """A captured step, replayed, is the step that is not captured."""
        params = model()
        captured, plain = (row.ours(cuda.put(params), **row.full, capturable=True) for _ in range(2))
        torch.manual_seed(0)
        grads = [[torch.randn(p.shape).cuda() for p in params] for _ in range(8)]
        for p, q, grad in zip(params_of(captured), params_of(plain), grads[0], strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            captured.step()
        torch.cuda.current_stream().wait_stream(stream)
        plain.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        for step in grads[1:]:
            for p, q, grad in zip(params_of(captured), params_of(plain), step, strict=True):
                p.grad.copy_(grad)
                q.grad.copy_(grad)
            graph.replay()
            plain.step()
        same(row, captured, plain)

    @pytest.mark.parametrize("name", ["SGD", "Lion", "LARS"])
    def test_graph_of_what_counts_nothing(self, cuda, name):
        row = ROW[name]
        params = model()
        captured, plain = (row.ours(cuda.put(params), **row.full) for _ in range(2))
        graph = captured_after_a_step(captured, plain)
        for _ in range(3):
            graph.replay()
            plain.step()
        same(row, captured, plain)

    @pytest.mark.parametrize(
        ("name", "reason"), [("AdamW", "capturable is False"), ("Prodigy", "its step size is estimated on the CPU")]
    )
    def test_graph_refuses_what_depends_on_the_cpu(self, cuda, name, reason):
        optimizer = ROW[name].ours(cuda.put(model()))
        train(optimizer, model(), [1])
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=reason), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()

    def test_graph_outlives_the_optimizer(self, cuda):
        row, start = ROW["AdamW"], model()
        captured, plain = (row.ours(cuda.put(start), lr=0.01, capturable=True) for _ in range(2))
        graph = captured_after_a_step(captured, plain)
        params, state = params_of(captured), captured.state
        del captured
        junk = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(32)]  # takes whatever has been let go
        for _ in range(3):
            graph.replay()
            plain.step()
        del junk
        for p, q in zip(params, params_of(plain), strict=True):
            assert bits(p.detach().cpu()) == bits(q.detach().cpu())
            assert bits(state[p]["exp_avg"].cpu()) == bits(plain.state[q]["exp_avg"].cpu())

    def test_on_torchs_current_stream(self, cuda):
        """Behind what is already on it, and before what comes after."""
        params = [torch.randn(1 << 20).requires_grad_() for _ in range(4)]
        there, here = onepass.AdamW(cuda.put(params), lr=0.01), onepass.AdamW(copies(params), lr=0.01)
        stream = torch.cuda.Stream()
        seen = []
        torch.cuda.synchronize()
        for step in range(1, 6):
            torch.manual_seed(step)
            grads = [torch.randn(1 << 20) for _ in params]
            on_gpu = [g.cuda() for g in grads]
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                for p, grad in zip(params_of(there), on_gpu, strict=True):
                    p.grad = grad * 1.0  # late, and freed right after the step
                there.step()
                for p in params_of(there):
                    p.grad = None
                for _ in range(4):
                    torch.full((1 << 20,), float("nan"), device="cuda")  # into the gradients' memory, later
                seen.append(params_of(there)[0].detach().clone())
            for p, grad in zip(params_of(here), grads, strict=True):
                p.grad = grad
            here.step()
            stream.synchronize()
            assert bits(seen[-1].cpu()) == bits(params_of(here)[0].detach())
        same(ROW["AdamW"], there, here)

    def test_counted_steps_and_reused_memory(self, cuda):
        """The memory of constants that are made on the GPU may be anybody's as soon as the step is on the stream."""
        params = model()
        there, here = (onepass.AdamW(cuda.put(params), lr=0.01, capturable=True) for _ in range(2))
        for step in range(1, 6):
            train(there, params, [step])
            for size in (16, 64, 256, 1024, 4096, 16384):
                torch.full((size,), float("nan"), device="cuda")
            train(here, params, [step])
            torch.cuda.synchronize()
        same(ROW["AdamW"], there, here)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
    def test_beside_torchs_fused(self, cuda, name, dtype):
        row = ROW[name]
        params = [torch.randn(1000, 37).to(dtype).requires_grad_() for _ in range(5)]
        ours = row.ours(cuda.put(params), **row.full, fused=True)
        theirs = row.theirs(cuda.put(params), **row.full, fused=True)
        for optimizer in (ours, theirs):
            train(optimizer, params)
        eps = torch.finfo(dtype).eps
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            assert list(ours.state[p]) == list(theirs.state[q])
            torch.testing.assert_close(p.detach(), q.detach(), rtol=8 * eps, atol=8 * eps)
            for key, value in theirs.state[q].items():
                assert ours.state[p][key].device == value.device
                assert ours.state[p][key].dtype == value.dtype

    def test_amp(self, cuda):
        """A loop with autocast and GradScaler, beside torch's fused AdamW: the same steps are skipped."""

        def trained(cls):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
            optimizer = cls(net.parameters(), lr=0.01, fused=True)
            scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)  # the first steps overflow
            x = torch.randn(256, 20, device="cuda")
            losses, steps = [], []
            for _ in range(40):
                with torch.autocast("cuda", dtype=torch.float16):
                    loss = torch.nn.functional.mse_loss(net(x), x[:, :1].sin())
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
                steps.append(max([s["step"].item() for s in optimizer.state.values()], default=0.0))
            return torch.tensor(losses), steps

        with only_kernels():
            ours, our_steps = trained(onepass.AdamW)
        theirs, their_steps = trained(torch.optim.AdamW)
        first = our_steps.index(1.0)
        assert 0 < first < 30
        assert our_steps[: first + 1] == their_steps[: first + 1]
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-4)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @for_rows(row for row in ELEMENTWISE if not row.wants_sparse)
    def test_a_checkpoint_moves_between_devices(self, cuda, row, device):
        params = model()
        here = row.ours(copies(params), **row.full)
        train(here, params, range(1, 4))
        saved = io.BytesIO()
        torch.save(here.state_dict(), saved)
        saved.seek(0)
        there = row.ours(cuda.put(params_of(here)), **row.full)
        there.load_state_dict(torch.load(saved, map_location=device, weights_only=True))
        train(here, params, range(4, 7))
        with only_kernels():
            train(there, params, range(4, 7))
        if "step" in row.scalars and len(row.scalars) == 1 and not row.sums:
            same(row, there, here)
        else:
            for p, q in zip(params_of(here), params_of(there), strict=True):
                torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("optimizer", [onepass.Adafactor, onepass.LBFGS])
    def test_what_has_no_kernels_there_is_torchs(self, cuda, optimizer):
        p = cuda.put([torch.randn(4, 3).requires_grad_()])[0]
        p.grad = torch.ones_like(p)
        assert [(row.path, row.reason) for row in onepass.explain(optimizer([p]))] == [("torch", "device cuda")]

    def test_cpu_and_gpu_parameters_together(self, cuda):
        params = model()
        here = onepass.AdamW(copies(params) + copies(params), lr=0.01)
        mixed = onepass.AdamW(copies(params) + cuda.put(params), lr=0.01)
        train(here, params + params)
        with only_kernels():
            train(mixed, params + params)
        same(ROW["AdamW"], mixed, here)

    def test_a_gradient_on_another_device_is_refused(self, cuda):
        """torch itself does not let one be assigned; it gets there when a parameter's memory is moved."""
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        optimizer = onepass.AdamW([p])
        p.data = p.data.cuda()
        with pytest.raises(ValueError, match="its gradient is on device cpu, not on the parameter's"):
            optimizer.step()
        assert not optimizer.state

    def test_a_tensor_of_more_than_two_to_the_31_elements(self, cuda):
        count = (1 << 31) + 12_345
        if torch.cuda.mem_get_info()[0] < 6 * count:
            pytest.skip("the GPU's memory is too small: not run")
        p = torch.zeros(count, dtype=torch.bfloat16, device="cuda").requires_grad_()
        p.grad = torch.full_like(p, 3.0)
        p.grad[-5:] = 7.0
        onepass.SGD([p], lr=0.5).step()
        with torch.no_grad():
            assert bool((p[:-5] == -1.5).all())
            assert bool((p[-5:] == -3.5).all())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU: not run")
    def test_two_gpus(self, cuda):
        params = model()
        here = onepass.AdamW(copies(params) + copies(params), lr=0.01)
        there = onepass.AdamW([p.detach().to(f"cuda:{n}").requires_grad_() for n in (1, 0) for p in params], lr=0.01)
        train(here, params + params)
        with only_kernels():
            train(there, params + params)
        assert torch.cuda.current_device() == 0
        same(ROW["AdamW"], there, here)
