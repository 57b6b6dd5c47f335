"""Stochastic rounding of 16-bit parameters and states.

A twin has float32 parameters and states. Before each step it is given the values of the optimizer that rounds. After
the step its parameters and states, rounded by the NumPy reference, must be those of that optimizer.
"""

import copy
import io
import math

import numpy as np
import onepass
import pytest
import stochastic
import torch
from cases import ROWS
from machines import ISAS
from onepass.optimizers import block_states
from onepass.swa_utils import AveragedModel
from reference import bits
from torch import nn

RULES = onepass._core.rules()
ROUNDING = [row for row in ROWS if getattr(row.ours, "is_elementwise", False)]
DENSE = [row for row in ROUNDING if not row.wants_sparse]
ADAMW = next(row for row in ROWS if row.name == "AdamW")
SHAPES = [(), (5,), (4, 3), (2, 0), (1100,), (7, 300)]
HALVES = (torch.bfloat16, torch.float16)

each_row = pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)
each_row_in_8_bits = pytest.mark.parametrize(
    "row", [row for row in DENSE if block_states.has_codings(row.ours.rule)], ids=lambda row: row.name
)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


def leaves(dtype, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def places(p):
    """The index of each element: its place in the order of the parameter's memory."""
    order = sorted(range(p.ndim), key=lambda d: -p.stride(d))
    index = torch.arange(p.numel()).reshape([p.shape[d] for d in order])
    return index.permute([order.index(d) for d in range(p.ndim)]).numpy()


def rounded(values, like, key, stream, order):
    """What the reference rounds values to, in the dtype of `like`; in other dtypes than 16 bits the values."""
    if like.dtype not in HALVES:
        return values.detach().to(like.dtype)
    values = values.detach().float().numpy()
    found = stochastic.rounded(values, str(like.dtype).removeprefix("torch."), key, stream, places(order))
    return torch.from_numpy(np.asarray(found)).to(like.dtype)


class Pair:
    """An optimizer with stochastic rounding, and its twin."""

    def __init__(self, row, params, *, kwargs=None, sparse=False, **arguments):
        self.row, self.params, self.seed, self.steps = row, params, arguments.get("rounding_seed", 0), 0
        self.sparse = sparse or row.wants_sparse
        kwargs = copy.deepcopy(row.full if kwargs is None else kwargs)
        if row.name == "Rprop":  # its step sizes begin with lr: a number that 16 bits hold exactly
            lr = kwargs.get("lr")
            kwargs["lr"] = torch.full_like(lr, 2.0**-7) if isinstance(lr, torch.Tensor) else 2.0**-7
        if row.copies:  # and its points with the parameter
            for p in params:
                p.data.copy_((16 * p.data).round() / 16)
        self.has_master = "master" in arguments
        wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in params]
        self.twins = [nn.Parameter(p.clone()) for p in wide]
        self.ours = row.ours(params, **kwargs, **arguments, stochastic_rounding=True)
        self.twin = row.ours(self.twins, **{**kwargs, "state_dtype": None})

    def states(self, p):
        names = RULES[self.ours.rule][1]
        return {name: value for name in names if (value := self.ours.state.get(p, {}).get(name)) is not None}

    def step(self, times=4, scale=1.0):
        for _ in range(times):
            self.steps += 1
            generator = torch.Generator().manual_seed(self.steps)
            for p, q in zip(self.params, self.twins, strict=True):
                values = torch.randn(p.shape, generator=generator) * scale
                if self.sparse and p.ndim:
                    values = values * (torch.rand(p.shape[0], generator=generator) < 0.5).view(-1, *[1] * (p.ndim - 1))
                grad = torch.empty_like(p).copy_(values)
                p.grad = grad.to_sparse(1) if self.sparse and p.ndim else grad
                q.grad = p.grad.to(q.dtype)
                if not self.has_master:
                    q.data.copy_(p)
                for name, value in self.states(p).items():
                    if name in self.twin.state[q]:
                        self.twin.state[q][name].copy_(value)
            self.ours.step()
            self.twin.step()
            self.compare()

    def compare(self):
        names = RULES[self.ours.rule][1]
        for number, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            key = stochastic.random_key(self.seed, self.steps, number)
            if self.has_master:
                name = "master" if "master" in self.ours.state[p] else "master_low"
                assert bits(onepass.optimizers.master.master_of(p, self.ours.state[p], name)) == bits(q.detach())
            else:
                assert bits(p.detach()) == bits(rounded(q, p, key, stochastic.PARAM, p)), (number, "parameter")
            for name, value in self.states(p).items():
                wanted = rounded(self.twin.state[q][name], value, key, names.index(name), p)
                assert bits(value) == bits(wanted), (number, name)


# -- the bits of the reference ---------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("row", ROUNDING, ids=lambda row: row.name)
def test_the_bits_of_the_reference(row, dtype, kernels_only):
    shapes = [shape for shape in SHAPES if shape] if row.wants_sparse else SHAPES
    Pair(row, leaves(dtype, shapes), rounding_seed=3).step()


@each_half
@pytest.mark.parametrize("row", [row for row in ROUNDING if row.sparse == "ours"], ids=lambda row: row.name)
def test_sparse_gradients(row, dtype, kernels_only):
    """Of short and of long rows. Elements without a gradient are not rounded again."""
    Pair(row, leaves(dtype, [(40, 100), (300, 7)]), sparse=True).step()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@each_row
def test_complex_parameters_are_rounded_to_nearest(row):
    """Neither a complex parameter nor its states are rounded stochastically."""
    start = torch.randn(40, 30, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(torch.complex32)
    p, q = start.clone().requires_grad_(), start.clone().requires_grad_()
    ours, plain = row.ours([p], **row.full, stochastic_rounding=True), row.ours([q], **row.full)
    for step in range(3):
        grad = torch.randn(40, 30, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
        p.grad, q.grad = grad.to(torch.complex32), grad.to(torch.complex32)
        ours.step()
        plain.step()
        assert bits(p.detach()) == bits(q.detach())
    assert ours.state[p].keys() == plain.state[q].keys()


BESIDE = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.bfloat16),
]


@pytest.mark.parametrize(("own", "states"), BESIDE, ids=str)
@each_row
def test_states_of_another_dtype(row, own, states, kernels_only):
    """Parameters and states of more than 16 bits are not rounded."""
    Pair(row, leaves(own), state_dtype=states).step()


@each_row_in_8_bits
def test_beside_8_bit_states(row, kernels_only):
    check_beside_8_bit_states(row)


@pytest.mark.cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tuning", ["intel", "amd"])
@each_row_in_8_bits
def test_beside_8_bit_states_with_every_instruction_set(row, isa, tuning):
    onepass._core.force_isa(isa)
    onepass._core.force_tuning(tuning)
    torch.set_num_threads(3)
    check_beside_8_bit_states(row)


def give_both(params, twins, seed):
    """Gives each parameter and its twin the same bfloat16 gradient."""
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        q.grad = p.grad.to(q.dtype, copy=True)


def check_states(state, wanted):
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            assert bits(value.view(torch.uint8)) == bits(wanted[name].view(torch.uint8)), name


def check_beside_8_bit_states(row):
    """The parameter is rounded stochastically, too, with its own random bits."""
    shapes = [(64, 128), (70, 77), (40, 3, 7, 7), (30,)]
    params, plain = leaves(torch.bfloat16, shapes), leaves(torch.bfloat16, shapes)
    for p in (params[0], plain[0]):
        p.data[1, :5] = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-40])
    wide = [nn.Parameter(p.detach().float()) for p in plain]
    ours = row.ours(params, **row.full, state_dtype=torch.float8_e4m3fn, stochastic_rounding=True)
    twin = row.ours(wide, **row.full, state_dtype=torch.float8_e4m3fn)
    for step in range(1, 4):
        give_both(params, wide, step)
        for p, q in zip(params, wide, strict=True):
            q.data.copy_(p)
        ours.step()
        twin.step()
        for number, (p, q) in enumerate(zip(params, wide, strict=True)):
            key = stochastic.random_key(0, step, number)
            wanted = rounded(q, p, key, stochastic.PARAM, p)
            assert torch.equal(p.isnan(), wanted.isnan())
            assert bits(p.detach()[~p.isnan()]) == bits(wanted[~wanted.isnan()])
            check_states(ours.state[p], twin.state[q])


@each_row_in_8_bits
def test_beside_8_bit_states_and_masters(row, kernels_only):
    """stochastic_rounding changes nothing: the parameter has a master, and 8-bit states are always rounded so."""
    params, plain = leaves(torch.bfloat16, [(64, 128), (70, 77)]), leaves(torch.bfloat16, [(64, 128), (70, 77)])
    kwargs = {**row.full, "state_dtype": torch.float8_e4m3fn, "master": "split"}
    ours, twin = row.ours(params, **kwargs, stochastic_rounding=True), row.ours(plain, **kwargs)
    for step in range(3):
        give_both(params, plain, step)
        ours.step()
        twin.step()
        for p, q in zip(params, plain, strict=True):
            assert bits(p.detach()) == bits(q.detach())
            check_states(ours.state[p], twin.state[q])


@pytest.mark.parametrize("master", ["split", "float32"])
@each_row
def test_beside_masters(row, master, kernels_only):
    """A parameter with a master is its nearest copy; its 16-bit states are rounded stochastically."""
    params = leaves(torch.bfloat16)
    Pair(row, params, master=master, state_dtype=torch.bfloat16).step()


VARIANTS = [
    pytest.param(row, kwargs, id=f"{row.name}-{name}")
    for row in DENSE
    for name, kwargs in {**row.variants, **row.own_variants}.items()
    if "state_dtype" not in kwargs and not kwargs.get("differentiable")
]


@pytest.mark.parametrize(("row", "kwargs"), VARIANTS)
def test_every_variant(row, kwargs):
    Pair(row, leaves(torch.bfloat16, [(64, 12), (77,)]), kwargs=kwargs).step(2)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@each_half
def test_every_instruction_set_and_number_of_threads(isa, threads, dtype, all_threads):
    onepass._core.force_isa(isa)
    torch.set_num_threads(threads)
    for row in DENSE:
        Pair(row, leaves(dtype, [(200, 200), (37, 1003)])).step(2)


KINDS = {
    "transposed": lambda p: p.t().contiguous().t(),
    "columns": lambda p: torch.cat([p, p], 1)[:, : p.shape[1]],
    "every second": lambda p: p.repeat_interleave(2, 1)[:, ::2],
    "misaligned": lambda p: torch.cat([p.flatten()[:1], p.flatten()])[1:].view(p.shape),
}


@pytest.mark.parametrize("kind", KINDS)
@each_half
def test_every_layout(kind, dtype, kernels_only):
    p = torch.randn(41, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    Pair(ADAMW, [nn.Parameter(KINDS[kind](p))]).step()


@each_half
def test_indices_above_32_bits(dtype):
    """The random bits of a shard that holds element 2^32."""
    first = (1 << 32) - 100
    values = torch.randn(257, generator=torch.Generator().manual_seed(0))
    found = values.clone()
    onepass._core.round_stochastically(found, str(dtype).removeprefix("torch."), 5, 1, first)
    index = np.arange(first, first + 257)
    wanted = stochastic.rounded(values.numpy(), str(dtype).removeprefix("torch."), 5, 1, index)
    np.testing.assert_array_equal(found.double().numpy(), wanted)


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0, 65536.0, 1e30, 3.3961e38, 3.4e38]


@each_half
def test_numbers_of_every_exponent(dtype):
    """Special numbers, and 16,384 of each exponent of float32, of both signs, with two streams."""
    generator = np.random.default_rng(0)
    pattern = (np.arange(1, 255, dtype=np.uint32)[:, None] << 23) + generator.integers(0, 1 << 23, (254, 16384))
    pattern = pattern.astype(np.uint32).flatten() | (generator.integers(0, 2, 254 * 16384) << 31).astype(np.uint32)
    values = np.concatenate([pattern.view(np.float32), np.array([*SPECIAL, *(-x for x in SPECIAL)], np.float32)])
    name = str(dtype).removeprefix("torch.")
    for stream in (0, 1, stochastic.PARAM):
        found = torch.from_numpy(values.copy())
        onepass._core.round_stochastically(found, name, 17, stream, 0)
        wanted = stochastic.rounded(values, name, 17, stream, np.arange(len(values)))
        np.testing.assert_array_equal(found.to(dtype).double().numpy(), wanted)


# -- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [1.0, 1.001, 3.9999, 0.1, 6.2e-5, 5.9e-5, 3.1e-7, 2e-8])
@pytest.mark.parametrize("stream", [0, 1, 4])
@each_half
def test_rounding_is_unbiased(dtype, stream, where):
    """The mean of a million draws is within 4.5 standard errors of the value, also where float16 is denormal."""
    values = torch.full((1_000_000,), where)
    exact = values[0].item()
    onepass._core.round_stochastically(values, str(dtype).removeprefix("torch."), 99, stream, 0)
    found = np.unique(values.numpy()).astype(np.float64)
    assert len(found) <= 2
    step = found[-1] - found[0]
    fraction = (exact - found[0]) / step if step else 0.0
    error = step * math.sqrt(fraction * (1 - fraction) / len(values)) + step * 2.0**-13
    assert abs(values.double().mean().item() - exact) <= 4.5 * error
    assert found[0] <= exact <= found[-1]


def test_small_steps_add_up():
    """SGD moves a bfloat16 parameter of 1 by 1/40 of its last place at each step."""
    p, plain = (nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16)) for _ in range(2))
    rounds, nearest = onepass.SGD([p], lr=1e-4, stochastic_rounding=True), onepass.SGD([plain], lr=1e-4)
    for _ in range(400):
        for q in (p, plain):
            q.grad = torch.ones_like(q)
        rounds.step()
        nearest.step()
    assert torch.equal(plain, torch.ones_like(plain))
    moved = 1 - p.detach().double()
    # 400 draws for each element, each with the variance of at most step * spacing.
    deviation = math.sqrt(400 * 1e-4 * 2.0**-8)
    assert abs(moved.mean().item() - 0.04) < 4.5 * deviation / 100
    assert moved.std().item() < 1.1 * deviation


def test_resumed_runs_have_the_mean_of_float32():
    """The mean over 1,000 seeds of a parameter after 20 steps, each resumed in the middle, is that of float32."""
    start = torch.linspace(-2, 2, 50)
    wide = nn.Parameter(start.bfloat16().float())
    twin = onepass.AdamW([wide], lr=1e-3, weight_decay=0.0)
    for step in range(20):
        wide.grad = torch.sin(torch.arange(50.0) + step)
        twin.step()
    found = []
    for seed in range(1000):
        p = nn.Parameter(start.bfloat16())
        optimizer = onepass.AdamW(
            [p], lr=1e-3, weight_decay=0.0, state_dtype=torch.float32, stochastic_rounding=True, rounding_seed=seed
        )
        for step in range(20):
            p.grad = torch.sin(torch.arange(50.0) + step).bfloat16()
            optimizer.step()
            if step == 9:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = onepass.AdamW([p], stochastic_rounding=True)
                optimizer.load_state_dict(saved)
        found.append(p.detach().double())
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(1000) + 1e-3 * 2.0**-7  # the gradients are rounded to bfloat16
    assert ((found.mean(0) - wide.detach().double()).abs() <= 4.5 * error).all()


# -- arguments -------------------------------------------------------------------------------------------------------


def test_groups_may_have_their_own():
    params, plain = leaves(torch.bfloat16, [(40,), (40,)]), leaves(torch.bfloat16, [(40,), (40,)])
    optimizer = onepass.AdamW(
        [{"params": params[:1]}, {"params": params[1:], "stochastic_rounding": False}], stochastic_rounding=True
    )
    whole = onepass.AdamW(plain, stochastic_rounding=False)
    assert "stochastic_rounding" not in whole.param_groups[0]
    for p, q in zip(params, plain, strict=True):
        p.grad = q.grad = torch.full_like(p, 0.3)
    optimizer.step()
    whole.step()
    assert bits(params[0].detach()) != bits(plain[0].detach())
    assert bits(params[1].detach()) == bits(plain[1].detach())
    # Only what is rounded needs a count of the steps.
    sgd = onepass.SGD([{"params": params[:1]}, {"params": params[1:], "stochastic_rounding": True}], lr=0.1)
    sgd.step()
    assert params[0] not in sgd.state
    assert sgd.state[params[1]]["step"] == 1


class Subclass(torch.Tensor):
    """A tensor that kernels do not step."""


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize(
    ("dtype", "arguments", "counts"),
    [
        (torch.bfloat16, {}, True),
        (torch.float32, {}, False),
        (torch.float32, {"momentum": 0.9}, False),
        (torch.float32, {"momentum": 0.9, "state_dtype": torch.bfloat16}, True),
        (torch.bfloat16, {"momentum": 0.9, "master": "split"}, False),
        (torch.bfloat16, {"momentum": 0.9, "master": "split", "state_dtype": torch.bfloat16}, True),
        (torch.float32, {"state_dtype": torch.float8_e4m3fn}, False),
        (torch.float32, {"momentum": 0.9, "state_dtype": torch.float8_e4m3fn}, True),
    ],
)
def test_which_parameters_of_sgd_count_their_steps(dtype, arguments, counts, by_torch):
    """Those of which something is rounded with random bits, whoever steps them."""
    p = torch.ones(64, 128, dtype=dtype)
    p = (p.as_subclass(Subclass) if by_torch else p).requires_grad_()
    optimizer = onepass.SGD([p], lr=0.1, stochastic_rounding=True, **arguments)
    for step in range(1, 4):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state.get(p, {}).get("step") == (step if counts else None)


def test_transforms_are_refused():
    from torch.fx.experimental.proxy_tensor import make_fx

    optimizer = onepass.AdamW(leaves(torch.bfloat16, [(4, 3)]), stochastic_rounding=True)
    p = optimizer.param_groups[0]["params"][0]

    def step(grad):
        p.grad = grad
        optimizer.step()
        return p

    before = bits(p.detach())
    with pytest.raises(RuntimeError, match="AdamW: stochastic rounding and 8-bit states need kernels, which make_fx"):
        make_fx(step)(torch.ones_like(p))
    assert bits(p.detach()) == before


@pytest.mark.parametrize("bad", [1, "yes", 0.0])
def test_bad_values(bad):
    with pytest.raises(TypeError, match="SGD: stochastic_rounding must be True or False, got"):
        onepass.SGD(leaves(torch.bfloat16), stochastic_rounding=bad)
    optimizer = onepass.SGD(leaves(torch.bfloat16))
    with pytest.raises(TypeError, match="SGD: group 1: stochastic_rounding must be True or False, got"):
        optimizer.add_param_group({"params": leaves(torch.bfloat16), "stochastic_rounding": bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", [onepass.Adafactor, onepass.CAME, onepass.Muon, onepass.NorMuon])
def test_classes_without(cls):
    params = leaves(torch.bfloat16, [(4, 3)])
    with pytest.raises(ValueError, match=f"{cls.__name__}: stochastic_rounding must be False"):
        cls(params, stochastic_rounding=True)
    with pytest.raises(TypeError, match="stochastic_rounding"):
        onepass.LBFGS(params, stochastic_rounding=True)


def test_differentiable_is_refused():
    params = leaves(torch.bfloat16, [(4, 3)])
    optimizer = onepass.Adam(params, differentiable=True, stochastic_rounding=True)
    params[0].grad = torch.ones_like(params[0])
    before = bits(params[0].detach())
    with pytest.raises(ValueError, match="stochastic_rounding cannot be given with differentiable=True"):
        optimizer.step()
    assert bits(params[0].detach()) == before


# -- checkpoints -----------------------------------------------------------------------------------------------------


def state_bits(optimizer, params):
    return [{name: bits(value) for name, value in optimizer.state[p].items()} for p in params]


@each_half
@each_row
def test_resumed(row, dtype):
    """A run that is saved and loaded in the middle has the bits of one that is not."""
    params, again = leaves(dtype), leaves(dtype)
    whole = row.ours(params, **row.full, stochastic_rounding=True, rounding_seed=9)
    first = row.ours(again, **row.full, stochastic_rounding=True, rounding_seed=9)
    for step in range(6):
        for p, q in zip(params, again, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            q.grad = p.grad.clone()
        whole.step()
        first.step()
        if step == 2:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            first = row.ours(again, **row.full)
            first.load_state_dict(torch.load(file, weights_only=True))
            assert first.param_groups[0]["stochastic_rounding"] is True
    assert [bits(p.detach()) for p in again] == [bits(p.detach()) for p in params]
    assert state_bits(first, again) == state_bits(whole, params)


def test_a_checkpoint_of_torchs_keeps_the_argument():
    params, theirs = leaves(torch.bfloat16), leaves(torch.bfloat16)
    optimizer, saved = (
        onepass.SGD(params, momentum=0.9, stochastic_rounding=True),
        torch.optim.SGD(theirs, momentum=0.9),
    )
    for p in (*params, *theirs):
        p.grad = torch.ones_like(p)
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in params)
    converted = onepass.convert_state_dict(optimizer.state_dict())
    assert converted["param_groups"][0]["stochastic_rounding"] is True
    saved.load_state_dict(converted)
    saved.step()


def test_a_count_on_the_cpu_stays_there():
    """torch's load_state_dict moves the step counts of a fused optimizer to the parameters' device."""
    params = leaves(torch.bfloat16)
    optimizer = onepass.SGD(params, momentum=0.9, fused=True, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 and optimizer.state[p]["step"].device.type == "cpu" for p in params)


# -- with everything else --------------------------------------------------------------------------------------------


@each_half
@each_row
def test_where_torchs_implementation_steps(row, dtype):
    """It steps a float32 copy, whose values are rounded with the random bits of the kernels."""
    p = leaves(dtype, [(41, 53)])[0].detach().as_subclass(Subclass).requires_grad_()
    q = nn.Parameter(p.detach().as_subclass(torch.Tensor).float()).detach().as_subclass(Subclass).requires_grad_()
    optimizer, twin = row.ours([p], **row.full, stochastic_rounding=True), row.ours([q], **row.full)
    names = RULES[optimizer.rule][1]
    for step in range(1, 4):
        grad = torch.randn(41, 53, generator=torch.Generator().manual_seed(step)).to(dtype)
        p.grad, q.grad = grad.as_subclass(Subclass), grad.float().as_subclass(Subclass)
        q.data.copy_(p)
        own = optimizer.state[p]
        for name in (name for name in names if own.get(name) is not None):
            if name in twin.state[q]:
                twin.state[q][name].copy_(own[name])
        optimizer.step()
        twin.step()
        assert own["step"] == step
        key, order = stochastic.random_key(0, step, 0), p.detach().as_subclass(torch.Tensor)
        wanted = rounded(q.detach().as_subclass(torch.Tensor), p, key, stochastic.PARAM, order)
        assert bits(order) == bits(wanted)
        for name in (name for name in names if own.get(name) is not None):
            plain = twin.state[q][name].as_subclass(torch.Tensor)
            assert own[name].dtype == row.new_dtype(dtype)
            found = own[name].as_subclass(torch.Tensor)
            assert bits(found) == bits(rounded(plain, found, key, names.index(name), order)), name


@each_row
def test_kernels_and_torchs_implementation_in_turn(row):
    """The count goes on, whichever steps."""
    p = leaves(torch.bfloat16, [(64, 12)])[0]
    optimizer = row.ours([p], **row.full, stochastic_rounding=True)
    for step in range(1, 5):
        p.grad = torch.ones_like(p)
        if step % 2:
            optimizer.step()
        else:
            optimizer._step_by_torch_alone("a test", 1.0)
        assert optimizer.state[p]["step"] == step


@each_row
def test_with_a_tail(row):
    """Clipping, an average, a copy and zeroed gradients change nothing else, and follow the rounded parameter."""
    model, plain = nn.ParameterList(leaves(torch.bfloat16)), nn.ParameterList(leaves(torch.bfloat16))
    average = AveragedModel(model, decay=0.9).float()
    low = [p.detach().clone() for p in model]
    kwargs = {**row.full, "stochastic_rounding": True}
    optimizer = row.ours(model, **kwargs, clip_value=0.5, average=average, copy_to=low, zero_grad=True)
    bare = row.ours(plain, **kwargs)
    averages = [p.detach().double() for p in plain]
    for step in range(3):
        for p, q in zip(model, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            q.grad = p.grad.clamp(-0.5, 0.5)
        optimizer.step()
        bare.step()
        average.update_parameters(model)
        for i, (p, q) in enumerate(zip(model, plain, strict=True)):
            assert bits(p.detach()) == bits(q.detach()) == bits(low[i])
            averages[i] = p.detach().double() if step == 0 else averages[i] + 0.1 * (p.detach().double() - averages[i])
            assert not p.grad.count_nonzero()
    for mine, wanted in zip(average.module, averages, strict=True):
        torch.testing.assert_close(mine.detach().double(), wanted, rtol=1e-6, atol=1e-6)


def test_within_lookahead():
    """The slow weights follow the rounded parameter, which then is their nearest copy."""
    p, q = leaves(torch.bfloat16, [(64, 12)])[0], leaves(torch.bfloat16, [(64, 12)])[0]
    ahead = onepass.Lookahead(onepass.AdamW([p], lr=0.01, stochastic_rounding=True), k=2)
    plain = onepass.AdamW([q], lr=0.01, stochastic_rounding=True)
    slow = q.detach().clone()
    for step in range(1, 7):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        q.grad = p.grad.clone()
        ahead.step()
        plain.step()
        if step % 2 == 0:
            slow = (slow.float() + 0.5 * (q.detach().float() - slow.float())).bfloat16()
            q.data.copy_(slow)
        assert bits(p.detach()) == bits(q.detach())


def test_with_grad_scaler():
    p, q = leaves(torch.bfloat16, [(64, 12)])[0], leaves(torch.bfloat16, [(64, 12)])[0]
    scaled, plain = (onepass.SGD([x], lr=0.1, momentum=0.9, stochastic_rounding=True) for x in (p, q))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
        scaler.scale((p * inputs).sum()).backward()
        (q * inputs).sum().backward()
        if step == 2:
            p.grad[0, 0] = math.inf  # this step is skipped, and not counted
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update(1024.0)
        scaled.zero_grad()
        plain.zero_grad()
        assert bits(p.detach()) == bits(q.detach())
    assert state_bits(scaled, [p]) == state_bits(plain, [q])


@pytest.mark.parametrize("states", [None, torch.float8_e4m3fn])
@each_row_in_8_bits
def test_step_in_backward(row, states):
    """The bits of a step after the backward pass, also of parameters that lack a gradient or are frozen for a time."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    plain = copy.deepcopy(model)
    optimizer, fused = (
        row.ours(net.parameters(), **row.full, stochastic_rounding=True, state_dtype=states) for net in (plain, model)
    )
    model[2].requires_grad_(False)
    plain[2].requires_grad_(False)
    onepass.step_in_backward(fused)
    for step in range(6):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        for net in (model, plain):
            net[2].requires_grad_(step >= 3)
            (net[:3] if step % 2 else net)(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        fused.step()  # also steps parameters that have just been unfrozen
        fused.zero_grad()
        params, own = list(plain.parameters()), list(model.parameters())
        assert [bits(p.detach()) for p in own] == [bits(p.detach()) for p in params]
        for p, q in zip(own, params, strict=True):
            for name, value in optimizer.state[q].items():
                found = fused.state[p][name]
                assert bits(found.reshape(-1).view(torch.uint8)) == bits(value.reshape(-1).view(torch.uint8)), name


def test_explained():
    params = leaves(torch.bfloat16)
    optimizer = onepass.AdamW(params, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    assert {row.path for row in onepass.explain(optimizer)} == {"kernel"}
    assert not optimizer.state


def junk(like):
    """Leaves NaN in memory that is about to be used again."""
    held = [torch.full_like(like, math.nan) for _ in range(20)]
    del held


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["SGD", "Lion", "Signum"])
def test_the_count_does_not_depend_on_the_default_dtype(name, default_dtype):
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = (
        getattr(onepass, name)([p], lr=1e-5, momentum=0.9, stochastic_rounding=True)
        if name != "Lion"
        else (onepass.Lion([p], lr=1e-5, stochastic_rounding=True))
    )
    twin = copy.deepcopy(optimizer)
    torch.set_default_dtype(torch.float32)
    (q,) = twin.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    twin.step()
    torch.set_default_dtype(default_dtype)
    junk(p)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert bits(p) == bits(q)
    for key, value in twin.state[q].items():
        assert bits(optimizer.state[p][key]) == bits(value)
    assert {row.path for row in onepass.explain(optimizer)} == {"kernel"}


@pytest.mark.parametrize("count", [torch.tensor(5), 5.0, torch.tensor(5.0, dtype=torch.bfloat16)])
def test_a_momentum_that_begins_anew_beside_a_count_that_kernels_cannot_read(count):
    """torch's implementation steps it. It must not take a new momentum, of which nothing is written, for an old one."""
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = onepass.SGD([p], lr=1e-5, momentum=0.9, stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p].update(step=count, momentum_buffer=None)
    junk(p)
    optimizer.step()
    assert (optimizer.state[p]["momentum_buffer"] == 1).all()
