"""clip_grad_norm_, clip_grad_value_, get_total_norm and clip_grads_with_norm_ against torch's functions and float64."""

import inspect
import itertools
import math
import warnings

import numpy as np
import onepass
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from machines import ISAS
from reference import bits, numbers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import utils

NAMES = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*REAL, torch.complex64, torch.complex128]
NORM_TYPES = [2.0, 2, math.inf, "inf", 1.0, 3.0, 0.0, -math.inf]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Holder:
    """What torch's functions need of a parameter."""

    def __init__(self, grad):
        self.grad = grad


def holders(grads):
    return [Holder(grad) for grad in grads]


def tensors_of(dtype, scale=1.0):
    """Tensors of every kind that kernels can write: views, transposed, with gaps, of one element, empty."""
    base = torch.randn(40, 60, dtype=torch.complex128 if dtype.is_complex else torch.float64).mul(scale).to(dtype)
    long = torch.randn(20_011, dtype=torch.float64).mul(scale).to(dtype)
    return [
        base.clone(),
        base.clone().t(),
        base.clone()[3:7, ::5],
        base.clone()[::2].transpose(0, 1)[1:],
        base.clone()[:, :1],
        base[0, 0].clone(),
        base[:0].clone(),
        long,
        long.clone()[1::3],
        torch.stack([base, base]).permute(2, 0, 1)[:, :, ::7],
    ]


def copies(grads):
    """Copies with the same strides."""
    made = []
    for grad in grads:
        size = 1 + sum((n - 1) * s for n, s in zip(grad.shape, grad.stride(), strict=True)) if grad.numel() else 0
        copy = torch.zeros(size, dtype=grad.dtype).as_strided(grad.shape, grad.stride())
        made.append(copy.copy_(grad))
    return made


def exact_norm(grads, norm_type=2.0):
    values = np.concatenate([[0.0], *(numbers(grad).ravel() for grad in grads)])
    if norm_type == math.inf:
        return max((float(grad.abs().max()) for grad in grads if grad.numel()), default=0.0)
    return math.sqrt(math.fsum(values**2))


def rounding(dtype):
    return torch.finfo(dtype).eps / 2


def same_bits(a, b):
    """Except for the signs of zeros in complex tensors, which torch multiplies by complex numbers."""
    if a.is_complex() or not a.numel():
        return torch.equal(a, b)
    return bits(a.clone(memory_format=torch.contiguous_format)) == bits(b.clone(memory_format=torch.contiguous_format))


def assert_same_bits(ours, theirs):
    assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not same_bits(a, b)] == []


# -- the interface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name):
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (onepass, utils))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_forms_of_the_first_argument():
    grad = torch.tensor([3.0, 4.0])
    for make in (
        lambda p: p,
        lambda p: [p],
        lambda p: (p,),
        lambda p: {p},
        lambda p: iter([p]),
        lambda p: (q for q in [p]),
        lambda p: [nn.Parameter(torch.zeros(3)), p],  # without a gradient
    ):
        p = nn.Parameter(torch.zeros(2))
        p.grad = grad.clone()
        assert onepass.clip_grad_norm_(make(p), 1.0).item() == 5.0
        torch.testing.assert_close(p.grad, grad / 5)
        p.grad = grad.clone()
        assert onepass.clip_grad_value_(make(p), 3.5) is None
        assert p.grad.tolist() == [3.0, 3.5]
        assert onepass.clip_grads_with_norm_(make(p), 1.0, torch.tensor(2.0)) is None
        torch.testing.assert_close(p.grad, torch.tensor([1.5, 1.75]))
    for tensors in (grad, [grad], iter([grad])):
        assert onepass.get_total_norm(tensors).item() == 5.0


@pytest.mark.parametrize("params", [[], [nn.Parameter(torch.zeros(2))]], ids=["none", "no gradient"])
def test_nothing_to_clip(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for norm_type in (2.0, math.inf, 1.0):
            ours, theirs = (module.clip_grad_norm_(params, 1.0, norm_type) for module in (onepass, utils))
            assert ours.item() == theirs.item() == 0.0
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert onepass.clip_grads_with_norm_(params, 1.0, torch.tensor(1.0)) is None
        assert onepass.clip_grad_value_(params, 1.0) is None  # torch's raises an internal error
        assert onepass.get_total_norm([]).item() == 0.0


def test_an_empty_generator_warns_once():
    for module in (onepass, utils):
        with pytest.warns(UserWarning, match="`parameters` is an empty generator") as caught:
            module.clip_grad_norm_((p for p in []), 1.0)
        assert [warning.filename for warning in caught] == [__file__]


def test_wrong_arguments_raise_torchs_errors():
    grad = [Holder(torch.ones(2))]
    for call in (
        lambda module: module.clip_grad_norm_(3, 1.0),
        lambda module: module.clip_grad_norm_([3], 1.0),
        lambda module: module.clip_grad_norm_(grad, "x"),
        lambda module: module.clip_grad_norm_(grad, 1.0, "x"),
        lambda module: module.clip_grad_norm_(grad, 1.0, None),
        lambda module: module.clip_grad_value_(grad, "x"),
        lambda module: module.clip_grads_with_norm_(grad, 1.0, 2.0),
        lambda module: module.get_total_norm([None]),
        lambda module: module.get_total_norm([torch.ones(2), None]),
        lambda module: module.get_total_norm([3]),
        lambda module: module.get_total_norm([torch.ones(2, dtype=torch.int64)]),
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            call(utils)
        with pytest.raises(theirs.type) as ours:
            call(onepass)
        assert str(ours.value) == str(theirs.value)
    assert grad[0].grad.tolist() == [1.0, 1.0]


# -- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*discards the imaginary part")
@each_dtype
def test_norms(dtype, norm_type):
    grads = [grad for grad in tensors_of(dtype) if grad.numel()]  # torch's largest magnitude needs an element
    ours, theirs = (module.get_total_norm(grads, norm_type) for module in (onepass, utils))
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    torch.testing.assert_close(ours, theirs)
    if float(norm_type) in (2.0, math.inf):
        assert ours.item() == pytest.approx(exact_norm(grads, float(norm_type)), rel=rounding(ours.dtype))
    again = onepass.clip_grad_norm_(holders(grads), math.inf, norm_type)
    assert torch.equal(again, ours)
    assert not ours.requires_grad
    assert not onepass.get_total_norm([torch.ones(2, requires_grad=True)]).requires_grad


@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_norms_of_mixed_dtypes(pair):
    grads = [torch.full((3,), 2.0, dtype=dtype) for dtype in pair]
    for norm_type in (2.0, math.inf):
        ours, theirs = (module.get_total_norm(grads, norm_type) for module in (onepass, utils))
        assert ours.dtype == theirs.dtype
        assert ours.item() == pytest.approx(exact_norm(grads, norm_type), rel=rounding(ours.dtype))


def test_the_largest_magnitude_of_empty_tensors():
    assert onepass.get_total_norm([torch.ones(0)], math.inf).item() == 0.0  # an error in torch
    assert onepass.get_total_norm([torch.ones(0), torch.tensor([-2.0])], math.inf).item() == 2.0


def test_norms_that_torch_cannot_hold():
    for dtype, value in ((torch.float32, 1e30), (torch.float16, 3e4)):
        p = Holder(torch.full((4,), value, dtype=dtype))
        norm = onepass.clip_grad_norm_([p], 1.0)
        assert norm.item() == (pytest.approx(2 * value) if dtype == torch.float32 else pytest.approx(6e4, rel=1e-3))
        torch.testing.assert_close(p.grad, torch.full((4,), 0.5, dtype=dtype))
    p = Holder(torch.full((16,), 3e4, dtype=torch.float16))
    assert onepass.clip_grad_norm_([p], 1.0).item() == math.inf  # rounded to float16
    torch.testing.assert_close(p.grad, torch.full((16,), 0.25, dtype=torch.float16))


@pytest.mark.parametrize("uncoalesced", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_sparse_gradients(norm_type, uncoalesced):
    indices = torch.tensor([[0, 2, 0] if uncoalesced else [0, 2, 4]])
    sparse = torch.sparse_coo_tensor(indices, torch.randn(3, 4), (5, 4), check_invariants=True)
    dense = torch.randn(6)
    wanted = exact_norm([sparse.to_dense(), dense], norm_type)
    params = holders([sparse, dense])
    before = sparse.to_dense(), dense.clone()
    assert onepass.clip_grad_norm_(params, 0.1, norm_type).item() == pytest.approx(wanted, rel=1e-6)
    factor = 0.1 / (wanted + 1e-6)
    torch.testing.assert_close(params[0].grad.to_dense(), before[0] * factor)
    torch.testing.assert_close(params[1].grad, before[1] * factor)


# -- clipping by norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, True, False])
@each_dtype
def test_clipping_by_a_known_norm_is_torchs_to_the_bit(dtype, foreach):
    grads = tensors_of(dtype)
    for norm, norm_dtype in itertools.product([0.3, 1.0, 70.3, 1e5], REAL):
        ours, theirs = copies(grads), copies(grads)
        total = torch.tensor(norm, dtype=norm_dtype)
        onepass.clip_grads_with_norm_(holders(ours), 1.0, total, foreach)
        utils.clip_grads_with_norm_(holders(theirs), 1.0, total, foreach)
        if norm_dtype == torch.float64:  # torch multiplies two tensors of shape () in float64
            alone = next(i for i, grad in enumerate(grads) if grad.ndim == 0)
            torch.testing.assert_close(ours.pop(alone), theirs.pop(alone))
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0], ids=str)
@each_dtype
def test_clipping_by_norm(dtype, norm_type, foreach):
    ours = [grad for grad in tensors_of(dtype) if grad.numel()]
    before, theirs = copies(ours), copies(ours)
    norms = [
        module.clip_grad_norm_(holders(grads), 2.0, norm_type, foreach=foreach)
        for module, grads in ((onepass, ours), (utils, theirs))
    ]
    torch.testing.assert_close(*norms)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    if norm_type != 1.0:
        factor = 2.0 / (exact_norm(before, norm_type) + 1e-6)
        for old, new in zip(before, ours, strict=True):
            np.testing.assert_allclose(numbers(new), numbers(old) * factor, rtol=2 * rounding(new.dtype), atol=1e-7)


def test_clipping_by_norm_is_that_of_an_optimizer():
    """The gradients of a clipping step, read off SGD's parameters."""
    grads = [torch.randn(50), torch.randn(30, 7, dtype=torch.float64)]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    onepass.SGD(params, lr=1.0, max_norm=0.7).step()
    stepped = [-p.detach() for p in params]
    onepass.clip_grad_norm_(params, 0.7)
    assert_same_bits([p.grad for p in params], stepped)


def test_mixed_dtypes():
    ours = [grad for dtype in DTYPES for grad in tensors_of(dtype)]
    before = copies(ours)
    onepass.clip_grad_norm_(holders(ours), 1.0)
    factor = 1.0 / (exact_norm(before) + 1e-6)
    for old, new in zip(before, ours, strict=True):
        atol = 1e-7 if new.dtype == torch.float16 else 0.0  # its denormals
        np.testing.assert_allclose(numbers(new), numbers(old) * factor, rtol=2 * rounding(new.dtype), atol=atol)


def test_a_norm_below_the_limit_writes_nothing():
    grad = torch.tensor([3.0, 4.0])
    version = grad._version
    onepass.clip_grad_norm_([Holder(grad)], 5.1)
    onepass.clip_grads_with_norm_([Holder(grad)], 5.1, torch.tensor(5.0))
    onepass.clip_grad_value_([Holder(grad)], math.inf)
    assert grad._version == version
    onepass.clip_grad_norm_([Holder(grad)], 4.9)
    assert grad._version == version + 1
    onepass.clip_grads_with_norm_([Holder(grad)], 4.9, torch.tensor(5.0))
    onepass.clip_grad_value_([Holder(grad)], 0.1)
    assert grad._version == version + 3


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan, torch.tensor(0.5), True])
@pytest.mark.parametrize("value", [1.0, 0.0, math.inf, math.nan])
def test_limits_and_norms_that_are_not_finite(value, max_norm):
    ours, theirs = (Holder(torch.tensor([2.0, -value, 0.0])) for _ in range(2))
    norms = [onepass.clip_grad_norm_([ours], max_norm), utils.clip_grad_norm_([theirs], max_norm)]
    torch.testing.assert_close(*norms, equal_nan=True)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_error_if_nonfinite(value, norm_type):
    p = Holder(torch.tensor([2.0, value]))
    before = bits(p.grad)
    with pytest.raises(RuntimeError) as theirs:
        utils.clip_grad_norm_([p], 1.0, norm_type, error_if_nonfinite=True)
    for call in (
        lambda: onepass.clip_grad_norm_([p], 1.0, norm_type, error_if_nonfinite=True),
        lambda: onepass.get_total_norm([p.grad], norm_type, True),
    ):
        with pytest.raises(RuntimeError) as ours:
            call()
        assert str(ours.value) == str(theirs.value)
    assert bits(p.grad) == before
    assert onepass.clip_grad_norm_([Holder(torch.ones(2))], 1.0, error_if_nonfinite=True).item() > 1.0


def test_every_pattern_of_16_bits():
    """Also of infinities, NaN, denormals and ties of rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(1 << 16).to(torch.int16).view(dtype)
        normal = every.float().abs() >= torch.finfo(torch.float32).tiny * 2
        for factor in (0.7, 1 / 3, 2**-7):
            norm = torch.tensor(1 / factor, dtype=torch.float64)
            ours, theirs = Holder(every.clone()), Holder(every.clone())
            onepass.clip_grads_with_norm_([ours], 1.0, norm)
            utils.clip_grads_with_norm_([theirs], 1.0, norm)
            kept = normal & (theirs.grad.float().abs() > torch.finfo(torch.float32).tiny)
            assert torch.equal(ours.grad[kept], theirs.grad[kept])
            assert torch.equal(ours.grad.isnan(), theirs.grad.isnan())
            lost = ~kept & ~theirs.grad.isnan()
            assert (ours.grad[lost].float() - theirs.grad[lost].float()).abs().max() < 2 * torch.finfo(
                torch.float32
            ).tiny


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memory_that_occurs_twice_is_scaled_twice(threads):
    torch.set_num_threads(threads)
    results = []
    for module in (onepass, utils):
        torch.manual_seed(0)
        base, other = torch.randn(2_000_000), torch.randn(1000, 1000)
        grads = [base, base, base[1000:1_500_000], base[::2], base[1::2], other, other.t(), base.view(1000, 2000)]
        module.clip_grads_with_norm_(holders(grads), 1.0, torch.tensor(1.7))
        results.append([base, other])
        counted = onepass.get_total_norm(grads)
        assert counted.item() == pytest.approx(exact_norm(grads), rel=1e-6)
    assert_same_bits(*results)


def test_a_gradient_that_overlaps_itself_raises_torchs_error():
    grad, other = torch.ones(1).expand(4), torch.ones(3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        onepass.clip_grad_norm_(holders([grad, other]), 0.1)
    assert onepass.get_total_norm([grad]).item() == 2.0


def test_lazily_negated_and_conjugated_gradients():
    z = torch.randn(7, dtype=torch.complex64)
    for lazy in (z.conj().imag, z.conj(), z.conj().imag[::2]):
        wanted, norm = lazy.clone() / 3, exact_norm([lazy.clone()])
        assert onepass.get_total_norm([lazy]).item() == pytest.approx(norm, rel=1e-6)
        onepass.clip_grads_with_norm_([Holder(lazy)], 1.0, torch.tensor(3.0))
        torch.testing.assert_close(lazy.clone(), wanted)


def test_gradients_that_need_gradients():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    (grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    p.grad = grad
    result = grad**3
    onepass.clip_grad_norm_([p], 1.0)
    torch.testing.assert_close(grad.norm().item(), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


class Other(torch.Tensor):
    pass


def test_subclasses_and_other_dtypes_are_left_to_torch():
    grads = [torch.tensor([3.0, 4.0]).as_subclass(Other), torch.tensor([12.0])]
    norm = onepass.clip_grad_norm_(holders(grads), 1.0)
    assert float(norm) == 13.0
    torch.testing.assert_close(grads[0].as_subclass(torch.Tensor), torch.tensor([3.0, 4.0]) / 13)
    torch.testing.assert_close(grads[1], torch.tensor([12.0]) / 13)
    onepass.clip_grad_value_(holders(grads), 0.3)
    torch.testing.assert_close(grads[0].as_subclass(torch.Tensor), torch.tensor([3.0 / 13, 0.3]))
    torch.testing.assert_close(grads[1], torch.tensor([0.3]))
    assert onepass.get_total_norm([torch.ones(2, device="meta")]).device.type == "meta"
    meta = Holder(torch.ones(2, device="meta"))
    assert onepass.clip_grad_norm_([meta], 1.0).device.type == "meta"


def test_transforms_and_compilation():
    def clipped(grad):
        p = Holder(grad * 2)
        return onepass.clip_grad_norm_([p], 1.0), onepass.get_total_norm([p.grad]), p.grad

    grad = torch.tensor([3.0, 4.0])
    wanted = clipped(grad)
    assert wanted[0].item() == 10.0
    for f in (torch.compile(clipped, backend="eager", fullgraph=True), torch.func.functionalize(clipped)):
        for a, b in zip(f(grad), wanted, strict=True):
            torch.testing.assert_close(a, b)


# -- clipping by value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_clipping_by_value_is_torchs_to_the_bit(dtype, foreach):
    for limit in (0.71, 1, 0.0, -0.3, 1e4, math.nan, torch.tensor(0.2), "0.1"):
        ours = tensors_of(dtype)
        ours[0][0, :4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
        theirs = copies(ours)
        onepass.clip_grad_value_(holders(ours), limit, foreach)
        utils.clip_grad_value_(holders(theirs), limit, foreach)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a[~a.isnan()], b[~b.isnan()])


def test_a_value_beyond_the_range():
    for limit in (1e6, 1e300, math.inf):
        p = Holder(torch.tensor([6e4, -math.inf if limit == math.inf else -5e4]).half())
        before = bits(p.grad)
        onepass.clip_grad_value_([p], limit)  # an error in torch
        assert bits(p.grad) == before


def test_complex_gradients_cannot_be_clipped_by_value():
    grads = [torch.ones(3), torch.ones(3) * 1j]
    with pytest.raises(NotImplementedError, match="clamp is not supported for complex types"):
        onepass.clip_grad_value_(holders(grads[::-1]), 0.1)
    assert grads[0].tolist() == [1.0] * 3


# -- threads and instruction sets ------------------------------------------------------------------------------------


def test_the_same_bits_on_every_machine():
    grads = [grad for dtype in DTYPES for grad in tensors_of(dtype)]
    grads += [torch.randn(n, dtype=torch.float64).to(dtype) for n in (*range(1, 40), 300_007) for dtype in REAL]
    grads += [torch.randn(1_000_003), torch.randn(700, 900).t()]
    grads += [torch.arange(1 << 16).to(torch.int16).view(dtype) for dtype in (torch.bfloat16, torch.float16)]
    for t in grads[-2:]:
        t[~t.isfinite()] = 1.0
    results = {}
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        onepass._core.force_isa(isa)
        torch.set_num_threads(threads)
        mine = copies(grads)
        norms = [onepass.clip_grad_norm_(holders(mine), 50.0), onepass.clip_grad_norm_(holders(mine), 0.3, math.inf)]
        values = copies([grad for grad in grads if not grad.is_complex()])
        onepass.clip_grad_value_(holders(values), 0.31)
        results[isa, threads] = [bits(t) for t in (*norms, *mine, *values)]
    expected = results[ISAS[0], 1]
    assert [key for key, result in results.items() if result != expected] == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(REAL),
            st.lists(st.integers(0, 5), max_size=3),
            st.permutations([0, 1, 2]),
            st.booleans(),
            st.floats(-20, 20),
        ),
        min_size=1,
        max_size=6,
    ),
    st.floats(1e-3, 1e3),
    st.sampled_from([2.0, math.inf]),
    st.integers(1, 2),
)
@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@example([(torch.float16, [], [0, 1, 2], True, 0.0)], 1.0, math.inf, 1)
def test_any_gradients(specs, max_norm, norm_type, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    grads = []
    for dtype, shape, order, gaps, exponent in specs:
        made = torch.randn([2 * n for n in shape], dtype=torch.float64).mul(2.0 ** (exponent / 2)).to(dtype)
        made = made.permute([i for i in order if i < len(shape)])
        grads.append(made[tuple(slice(None, None, 2) for _ in shape)] if gaps else made)
    before, theirs = copies(grads), copies(grads)
    norm = onepass.clip_grad_norm_(holders(grads), max_norm, norm_type)
    exact = exact_norm(before, norm_type)
    assert norm.item() == pytest.approx(exact, rel=rounding(norm.dtype), abs=1e-7)
    factor = min(1.0, max_norm / (exact + 1e-6))
    for old, new in zip(before, grads, strict=True):
        atol = 6e-8 if new.dtype == torch.float16 else 0.0
        rtol = 2.1 * rounding(new.dtype) + 8 * 2.0**-53  # the factor here is in float64, too, after some operations
        np.testing.assert_allclose(numbers(new), numbers(old) * factor, rtol=rtol, atol=atol)
    total = torch.tensor(exact)
    onepass.clip_grads_with_norm_(holders(before), max_norm, total)
    utils.clip_grads_with_norm_(holders(theirs), max_norm, total)
    assert_same_bits(before, theirs)


# -- processes -------------------------------------------------------------------------------------------------------


def spread_gradients():
    """Three meshes, several placements, plain tensors and a parameter without a gradient beside them."""
    tall, wide, line = (init_device_mesh("cpu", shape) for shape in ((2, 1), (1, 2), (2,)))
    wholes = [torch.randn(6, 5), torch.randn(7), torch.randn(3, 4), torch.randn(9), torch.randn(4)]
    placements = [(line, [Shard(0)]), (tall, [Shard(0), Replicate()]), (wide, [Shard(1), Shard(0)])]
    grads = [
        distribute_tensor(whole.clone(), *placement, src_data_rank=None)
        for whole, placement in zip(wholes, [*placements, (line, [Replicate()])], strict=False)
    ]
    return wholes, [*grads, wholes[4].clone()]


def clip_spread():
    wholes, grads = spread_gradients()
    exact = exact_norm(wholes)
    params = [*holders(grads), Holder(None)]
    versions = [grad._version for grad in grads]
    assert onepass.get_total_norm(grads).item() == pytest.approx(exact, rel=1e-12)
    assert onepass.clip_grad_norm_(params, 1.0).item() == pytest.approx(exact, rel=1e-12)
    assert all(grad._version > version for grad, version in zip(grads, versions, strict=True))
    for whole, grad in zip(wholes, grads, strict=True):
        found = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(found, whole / (exact + 1e-6))
    onepass.clip_grad_value_(params, 0.1)
    for whole, grad in zip(wholes, grads, strict=True):
        found = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(found, (whole / (exact + 1e-6)).clamp(-0.1, 0.1))


def clip_partial():
    line = init_device_mesh("cpu", (2,))
    local = torch.tensor([3.0, 4.0]) / 2
    grad = DTensor.from_local(local.clone(), line, [Partial()])
    assert onepass.clip_grad_norm_([Holder(grad)], 1.0).item() == 5.0
    torch.testing.assert_close(grad.full_tensor(), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_dtensors_on_several_meshes(processes):
    processes(2, clip_spread)


def test_sums_that_are_not_reduced(processes):
    processes(2, clip_partial)
