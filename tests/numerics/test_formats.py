"""Every dtype, alone and mixed, and every way in which a tensor may lie in memory."""

import os

import numpy as np
import onepass
import pytest
import torch
from cases import ELEMENTWISE, each_row, model
from reference import bits, checked_step, only_kernels, params_of

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def each(name, dtypes=DTYPES):
    return pytest.mark.parametrize(name, dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def spread(shape, *, low=-4.0, high=2.0):
    """Numbers of many magnitudes, and some zeros."""
    scale = 10 ** torch.empty(shape).uniform_(low, high)
    return torch.randn(shape) * scale * (torch.rand(shape) > 0.02)


def parameter(values, dtype):
    """A parameter that takes gradients of any dtype."""
    p = values.to(dtype).requires_grad_()
    p.grad_dtype = None
    return p


# -- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each("state")
@each("grad")
@each("param")
@each_row
def test_dtypes(row, param, grad, state):
    """Parameter, gradient and states each in a dtype of their own."""
    params = [parameter(spread(shape), param) for shape in [(), (0,), (5,), (33, 41)]]
    optimizer = row.ours(params, **row.full, state_dtype=state)
    for _ in range(4):
        for p in params:
            p.grad = spread(p.shape).to(grad)
        checked_step(row, optimizer)
    held = [optimizer.state[p][name] for p in params for name in row.states]
    assert all(p.dtype == param for p in params)
    assert all(s.dtype == state for s in held)


@each("param")
@each_row
def test_each_state_in_its_own_dtype(row, param):
    """States that were edited by hand, one by one."""
    p = parameter(spread(1500), param)
    optimizer = row.ours([p], **row.full)
    for turn in range(len(DTYPES)):
        for i, name in enumerate(row.states):
            if turn:
                optimizer.state[p][name] = optimizer.state[p][name].to(DTYPES[(turn + i) % len(DTYPES)])
        p.grad = spread(1500).to(DTYPES[turn - 1])
        checked_step(row, optimizer)


@each_row
def test_new_states_have_torchs_dtype(row):
    for dtype in DTYPES:
        ours, theirs = ([torch.ones(3, dtype=dtype, requires_grad=True)] for _ in range(2))
        for kind, params in ((row.ours, ours), (row.theirs, theirs)):
            params[0].grad = torch.ones_like(params[0])
            optimizer = kind(params, **row.full)
            optimizer.step()
            assert [optimizer.state[params[0]][name].dtype for name in row.states] == [row.new_dtype(dtype)] * len(
                row.states
            )


@each("dtype", [torch.bfloat16, torch.float16])
def test_ties_are_rounded_to_even(dtype):
    """Sums that lie exactly between two numbers of 16 bits."""
    p = parameter(torch.linspace(-2, 2, 1001), dtype)
    half_an_ulp = p.detach().float().abs().log2().floor().exp2() * torch.finfo(dtype).eps / 2
    p.grad = -half_an_ulp.copysign(p.detach().float())
    exact = p.detach().double() - p.grad.double()
    with only_kernels(1):
        onepass.SGD([p], lr=1.0).step()
    assert torch.equal((exact - p.detach().double()).abs(), half_an_ulp.double())  # ties they were
    assert bits(p) == bits(exact.to(dtype))


# -- layouts ---------------------------------------------------------------------------------------------------------
#
# Each takes packed values to a tensor of the same values that lies otherwise, and comes with the memory around it.

GUARD = 7.25
SHAPE = (4, 6, 5, 3)


def _packed(x):
    return x.clone()


def _channels_last(x):
    return x.clone(memory_format=torch.channels_last)


def _permuted(x):
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def _sliced(x):
    within = torch.full([n + 3 for n in x.shape], GUARD, dtype=x.dtype)
    return within[1:-2, 2:-1, 1:-2, 1:-2].copy_(x)


def _every_second(x):
    return torch.full([2 * n for n in x.shape], GUARD, dtype=x.dtype)[::2, ::2, ::2, 1::2].copy_(x)


def _odd_offset(x):
    return torch.full([x.numel() + 9], GUARD, dtype=x.dtype)[3:-6].view(x.shape).copy_(x)


def _misaligned(x):
    """Elements begin at odd bytes."""
    memory = np.full(x.nbytes + 16, 77, np.uint8)
    kind = np.dtype(f"i{x.element_size()}")
    view = torch.from_numpy(memory[5 : 5 + x.nbytes].view(kind)).view(x.dtype).view(x.shape)
    assert view.data_ptr() % 2 == 1
    return view.copy_(x)


LAYOUTS = [_packed, _channels_last, _permuted, _sliced, _every_second, _odd_offset, _misaligned]


def _expanded(x):
    return x[:, :1, :, :1].expand(x.shape)


def _expanded_scalar(x):
    return x[0, 0, 0, 0].expand(x.shape)


def layouts(name, kinds):
    return pytest.mark.parametrize(name, kinds, ids=lambda kind: kind.__name__.strip("_"))


def surroundings(t):
    """The bytes of a tensor's storage that are not its own."""
    memory = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    own = torch.zeros(len(memory) // t.element_size(), dtype=torch.bool)
    if t.data_ptr() % t.element_size():  # misaligned: it has its storage to itself
        return b""
    own.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    return memory[~own.repeat_interleave(t.element_size())].numpy().tobytes()


@pytest.mark.slow
@layouts("grad_layout", [*LAYOUTS, _expanded, _expanded_scalar])
@layouts("layout", LAYOUTS)
@each_row
def test_layouts(row, layout, grad_layout):
    """However parameter and gradient lie, the result is to the bit that of packed ones, and nothing else is written."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = torch.randn(SHAPE).to(dtype)
        p, packed = layout(values).requires_grad_(), values.clone().requires_grad_()
        ours, expected = row.ours([p], **row.full), row.ours([packed], **row.full)
        around = surroundings(p.detach())
        for _ in range(3):
            p.grad = grad_layout(torch.randn(SHAPE).to(dtype))
            around_grad, grad = surroundings(p.grad), bits(p.grad)
            packed.grad = p.grad.contiguous()
            with only_kernels(2):
                ours.step()
                expected.step()
            pairs = [(p, packed), *((ours.state[p][name], expected.state[packed][name]) for name in row.states)]
            for got, want in pairs:
                if row.sums:  # the sums of other elements first
                    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
                else:
                    assert bits(got) == bits(want)
            assert (bits(p.grad), surroundings(p.grad)) == (grad, around_grad)
        assert surroundings(p.detach()) == around


@layouts("layout", LAYOUTS[1:])
@each_row
def test_states_that_lie_otherwise(row, layout):
    """States put there by hand need not be packed as the parameter is."""
    p, packed = (torch.ones(SHAPE, requires_grad=True) for _ in range(2))
    ours, expected = row.ours([p], **row.full), row.ours([packed], **row.full)
    for step in range(4):
        p.grad = packed.grad = torch.randn(SHAPE)
        with only_kernels(2):
            ours.step()
            expected.step()
        if step == 0:
            for name in row.states:
                ours.state[p][name] = layout(ours.state[p][name])
        assert bits(p) == bits(packed)
        assert all(bits(ours.state[p][name]) == bits(expected.state[packed][name]) for name in row.states)


@each_row
def test_one_dimension_with_a_step(row):
    """Every length about a tile's, with elements that lie apart."""
    for length in (1, 2, 1023, 1024, 1025, 3000):
        memory = torch.randn(3 * length + 2)
        p = memory[1 : 1 + 3 * length : 3].requires_grad_()
        optimizer = row.ours([p], **row.full)
        around = surroundings(p.detach())
        for _ in range(3):
            p.grad = torch.randn(2 * length)[::2]
            checked_step(row, optimizer)
        assert surroundings(p.detach()) == around


# -- complex, negated and conjugated ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@each_row
def test_complex(row, dtype):
    """Complex numbers are pairs of real ones, as in torch."""
    for name, kwargs in row.variants.items():
        z = torch.randn(7, 9, 2, dtype=dtype).transpose(0, 1).requires_grad_()
        pair = torch.view_as_real(z.detach()).clone().requires_grad_()
        ours, expected = row.ours([z], **kwargs), row.ours([pair], **kwargs)
        for _ in range(4):
            z.grad = torch.randn(9, 7, 2, dtype=dtype)
            pair.grad = torch.view_as_real(z.grad).clone()
            with only_kernels(2):
                ours.step()
                expected.step()
        assert bits(z) == bits(pair), name
        for state in ours.state[z].keys() & set(row.states):
            assert ours.state[z][state].dtype == dtype
            assert bits(ours.state[z][state]) == bits(expected.state[pair][state]), name


@pytest.mark.parametrize("row", [row for row in ELEMENTWISE if row.flavours[0]], ids=lambda row: row.name)
def test_complex_beside_real_as_in_torch(row):
    params = [torch.randn(5, dtype=torch.complex64), torch.randn(4, 3), torch.randn(2, 2, dtype=torch.complex128)]
    ours = row.ours([p.clone().requires_grad_() for p in params], **row.full)
    theirs = row.theirs([p.clone().requires_grad_() for p in params], **row.full)
    for _ in range(10):
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        with only_kernels(3):
            ours.step()
        theirs.step()
    torch.testing.assert_close(params_of(ours), params_of(theirs), rtol=1e-5, atol=1e-6)


@each_row
def test_negated_and_conjugated_gradients(row):
    """torch negates and conjugates by a mark on the tensor; the memory holds something else."""
    z = torch.randn(6, 5, dtype=torch.complex64)
    for p, grad in (
        (torch.randn(6, 5), z.conj().imag),
        (torch.randn(6, 5), torch._neg_view(z.real)),
        (z.clone(), z.conj()),
        (z.clone(), z.t().contiguous().mH.conj().resolve_conj().conj()),
    ):
        assert grad.is_neg() or grad.is_conj()
        p.requires_grad_()
        optimizer = row.ours([p], **row.full)
        for _ in range(3):
            p.grad = grad
            checked_step(row, optimizer)


# -- size ------------------------------------------------------------------------------------------------------------


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 12 << 30, reason="needs 12 GiB of memory")
def test_more_than_2_to_the_31_elements():
    """Indices do not fit 32 bits; every element is looked at. The gradient is one row, expanded."""
    columns = 251  # a prime: no two neighbouring rows, tiles or threads look alike
    rows = (1 << 31) // columns + 5
    torch.set_num_threads(os.cpu_count() or 1)
    row = torch.arange(columns) - 100.0
    p = torch.empty(rows, columns, dtype=torch.bfloat16)
    assert p.numel() > 1 << 31
    p.copy_(row).requires_grad_()
    p.grad = (row % 7 + 1).to(torch.bfloat16).expand(rows, columns)
    with only_kernels(1):
        onepass.SGD([p], lr=0.5).step()
    expected = (row - 0.5 * (row % 7 + 1)).to(torch.bfloat16)
    assert not torch.equal(expected, row.to(torch.bfloat16))
    for chunk in p.detach().split(1 << 18):
        assert torch.equal(chunk, expected.expand(chunk.shape))


@each_row
def test_empty(row):
    """Tensors without elements are stepped like any other: states and counters exist afterwards."""
    params = [torch.empty(shape, requires_grad=True) for shape in [(0,), (0, 3), (2, 0, 5)]]
    optimizer = row.ours(params, **row.full)
    for step in range(1, 3):
        for p in params:
            p.grad = torch.empty_like(p)
        with only_kernels(len(params)):
            optimizer.step()
        for p in params:
            assert all(optimizer.state[p][name].shape == p.shape for name in row.states)
            assert not row.counts_steps or optimizer.state[p]["step"] == step


# -- denormal numbers ------------------------------------------------------------------------------------------------


def denormals_survive(n=1):
    """Whether the caller's arithmetic keeps denormals, on each of torch's threads if n is large."""
    return torch.count_nonzero(torch.full((n,), 1e-40) * 1.0).item() == n


@each("dtype", [torch.float32, torch.bfloat16])
@each_row
def test_denormal_states_become_zero(row, dtype):
    """States full of denormals have the same effect as zeros, and no denormals come of them."""
    ends = []
    for value in (1e-39, 0.0):
        p = torch.ones(100, dtype=dtype, requires_grad=True)
        optimizer = row.ours([p], **row.undecayed)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        states = [optimizer.state[p][name] for name in row.states]
        for state in states:
            state.fill_(value)
            assert state.count_nonzero() == (100 if value else 0)
        with only_kernels(1):
            optimizer.step()
        assert all(not s or abs(s) >= torch.finfo(dtype).tiny for state in states for s in state.tolist())
        ends.append([bits(t) for t in (p, *states)])
    assert ends[0] == ends[1]
    assert row.copies or torch.equal(p, torch.ones_like(p))  # a state that begins as the parameter attracts it


@each_row
def test_float16_keeps_its_denormals(row):
    """They are ordinary numbers in the arithmetic's float32, and a state in float16 may well need them."""
    p = torch.full((100,), 1e-5, dtype=torch.float16, requires_grad=True)
    optimizer = row.ours([p], **row.undecayed)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    for name in row.states:
        optimizer.state[p][name].fill_(3e-5)
    checked_step(row, optimizer)
    last = [name for name in row.states if name not in ("neg_pre_grad", "last_grad")][-1]  # the gradient is zero
    assert all(0 < s < 6e-5 for s in optimizer.state[p][last])


@pytest.mark.parametrize("flush", [False, True])
@each_row
def test_callers_floating_point_mode_stays(row, flush):
    """Denormals are flushed in the step alone, on every thread."""
    many = 1 << 22
    assert denormals_survive()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for p in [*model(), torch.ones(many // 2, requires_grad=True)]:
            optimizer = row.ours([p], **row.full)
            p.grad = torch.full_like(p, 1e-40)
            try:
                torch.set_flush_denormal(flush)
                optimizer.step()
                assert denormals_survive() is not flush
            finally:
                torch.set_flush_denormal(False)
        assert denormals_survive(many)
