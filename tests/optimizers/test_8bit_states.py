"""8-bit states: a step has the bits that the NumPy reference of the format gives.

A twin has float32 states. Before each step it is given the values that the reference decodes. After the step its
states, encoded by the reference, must be the codes and scales of the optimizer with 8-bit states, and the parameters
must have the same bits.
"""

import copy
import io
import math
import warnings

import blocks
import numpy as np
import onepass
import pytest
import stochastic
import torch
from cases import ROWS
from contract import through_a_file
from machines import ISAS
from onepass.optimizers import block_states
from onepass.swa_utils import AveragedModel
from reference import bits, params_of
from torch import nn

CODES, SCALES = torch.float8_e4m3fn, torch.float8_e8m0fnu
RULES = onepass._core.rules()
NAMES_8BIT = {
    "ADOPT",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adam",
    "AdamW",
    "Adamax",
    "LaProp",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
    "Signum",
    "SparseAdam",
}
IN_8BIT = [row for row in ROWS if row.name in NAMES_8BIT]
DENSE = [row for row in IN_8BIT if not row.wants_sparse]
ADAMW = next(row for row in ROWS if row.name == "AdamW")

# Whole blocks; a tail in each row; rows shorter than a block; a filter whose last dimension is short; one row.
SHAPES = [(64, 128), (70, 77), (600, 9), (40, 3, 7, 7), (1, 5000), (4096, 1)]

each_row = pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)


def rows_of(tensor, codes):
    """The elements of a tensor in the order in which the codes are in memory, a row for each of dimension 0."""
    order = sorted(range(codes.ndim), key=lambda d: -codes.stride(d))
    return tensor.detach().permute(order).reshape(tensor.shape[0], -1)


def code_bytes(codes):
    return rows_of(codes, codes).view(torch.uint8).numpy()


def set_rows(tensor, codes, values):
    """Sets a tensor to values in the order in which the codes are in memory."""
    order = sorted(range(codes.ndim), key=lambda d: -codes.stride(d))
    view = tensor.detach().permute(order)
    view.copy_(torch.from_numpy(values).reshape(view.shape))


class Pair:
    """An optimizer with 8-bit states, and its twin."""

    def __init__(self, cls, params, *, seed=0, **kwargs):
        self.params = params
        self.twins = [nn.Parameter(p.detach().clone()) for p in params]
        own = {**kwargs, "rounding_seed": seed} if seed else kwargs
        self.ours = cls(params, **own, state_dtype=CODES)
        self.twin = cls(self.twins, **kwargs, state_dtype=torch.float32)
        self.seed, self.steps = seed, 0

    def names(self, p):
        return [
            name
            for name in self.ours.state[p]
            if self.ours.state[p][name].__class__ is torch.Tensor and self.ours.state[p][name].dtype == CODES
        ]

    def give(self, seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(self.params, self.twins, strict=True):
            values = torch.randn(p.shape, generator=generator) * scale * torch.rand(p.shape, generator=generator) ** 4
            p.grad = torch.empty_like(p).copy_(values)
            q.grad = p.grad.clone()

    def before(self):
        for p, q in zip(self.params, self.twins, strict=True):
            for name in self.names(p):
                state = self.ours.state[p]
                scales = state[name + "_scale"].view(torch.uint8).numpy()
                values = blocks.decoded(code_bytes(state[name]), scales, block_states.codings()[name])
                set_rows(self.twin.state[q][name], state[name], values)

    def after(self):
        states = RULES[self.ours.rule][1]
        for number, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            assert bits(p.detach()) == bits(q.detach()), number
            for name in self.names(p):
                state, coding = self.ours.state[p], block_states.codings()[name]
                key = stochastic.random_key(self.seed, self.steps, number)
                values = rows_of(self.twin.state[q][name], state[name]).numpy()
                codes, scales = blocks.encoded(values, coding, key, states.index(name))
                np.testing.assert_array_equal(state[name + "_scale"].view(torch.uint8).numpy(), scales)
                np.testing.assert_array_equal(code_bytes(state[name]), codes)

    def step(self, times=3, scale=1.0):
        for _ in range(times):
            self.give(self.steps + 17, scale)
            self.before()
            self.steps += 1
            self.ours.step()
            self.twin.step()
            self.after()


def leaves(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


# -- the bits of the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_row
def test_the_bits_of_the_reference(row, dtype, kernels_only):
    Pair(row.ours, leaves(dtype), **row.full).step()


VARIANTS = [
    pytest.param(row, kwargs, id=f"{row.name}-{name}")
    for row in DENSE
    for name, kwargs in {**row.variants, **row.own_variants}.items()
    if "state_dtype" not in kwargs
]


@pytest.mark.parametrize(("row", "kwargs"), VARIANTS)
def test_every_variant(row, kwargs):
    Pair(row.ours, leaves(shapes=[(64, 128), (70, 77)]), **copy.deepcopy(kwargs)).step(2)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_and_number_of_threads(isa, threads, dtype, all_threads):
    onepass._core.force_isa(isa)
    torch.set_num_threads(threads)
    for row in DENSE:
        Pair(row.ours, leaves(dtype, [(200, 200), (37, 1003), (3000, 12)]), **row.full).step(2)


def packed_otherwise(values, kind):
    if kind == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    order = {"transposed": (1, 0, 2, 3), "all reversed": (3, 2, 1, 0), "filters outermost": (0, 3, 1, 2)}[kind]
    made = values.permute(order).contiguous()
    return made.permute(torch.argsort(torch.tensor(order)).tolist())


@pytest.mark.parametrize("kind", ["channels last", "transposed", "all reversed", "filters outermost"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_order_of_dimensions(kind, dtype, kernels_only):
    values = torch.randn(24, 16, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    pair = Pair(onepass.AdamW, [nn.Parameter(packed_otherwise(values, kind))])
    pair.step()
    codes = pair.ours.state[pair.params[0]]["exp_avg"]
    assert codes.stride(0) == 16 * 5 * 7  # rows are never divided
    for q, name in ((pair.twins[0], "exp_avg"), (pair.twins[0], "exp_avg_sq")):
        state = pair.ours.state[pair.params[0]]
        assert bits(block_states.decoded(state[name], state[name + "_scale"], name)) is not None
        assert q.shape == state[name].shape


def test_columns_of_a_wider_matrix_and_misaligned(kernels_only):
    wide = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    storage = torch.zeros(64 * 128 * 4 + 4, dtype=torch.uint8)[4:].view(torch.float32).view(64, 128)
    pair = Pair(onepass.AdamW, [nn.Parameter(wide[:, 5:82]), nn.Parameter(storage)])
    pair.step()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e-38, 0.0])
def test_small_and_large_gradients(scale):
    for row in DENSE:
        Pair(row.ours, leaves(shapes=[(64, 128)]), **row.full).step(2, scale)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_makes_its_block_nan(bad):
    p = nn.Parameter(torch.ones(64, 128))
    optimizer = onepass.AdamW([p], state_dtype=CODES)
    p.grad = torch.ones_like(p)
    p.grad[3, 40] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[p]
        scales, codes = state[name + "_scale"].view(torch.uint8), state[name].view(torch.uint8)
        assert (scales == 255).nonzero().tolist() == [[3, 1]]
        assert not codes[3, 32:64].count_nonzero()
        assert block_states.decoded(state[name], state[name + "_scale"], name).isnan().sum() == 32


def test_a_second_moment_is_never_zero_where_the_gradient_was_not():
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = onepass.AdamW([p], lr=1e-3, state_dtype=CODES)
    p.grad = torch.full_like(p, 1e-12)
    p.grad[:, ::32] = 1e6
    p.grad[5, 5] = 0
    optimizer.step()
    state = optimizer.state[p]
    zero = block_states.decoded(state["exp_avg_sq"], state["exp_avg_sq_scale"], "exp_avg_sq") == 0
    assert zero.nonzero().tolist() == [[5, 5]]
    assert p.abs().max() < 2e-3


# -- which states ----------------------------------------------------------------------------------------------------


def test_which_optimizers():
    assert {row.name for row in ROWS if row.name != "LBFGS" and block_states.has_codings(row.ours.rule)} == NAMES_8BIT


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in {*NAMES_8BIT, "LBFGS"}], ids=lambda r: r.name)
def test_classes_without_8_bit_states(row):
    p = nn.Parameter(torch.zeros(64, 128))
    with pytest.raises(
        ValueError, match=f"{row.name}: state_dtype cannot be torch.float8_e4m3fn, because {row.name} has"
    ):
        row.ours([p], **row.full, state_dtype=CODES)


@pytest.mark.parametrize(
    ("p", "dtype"),
    [
        (torch.zeros(64, 63), torch.float32),
        (torch.zeros(5000), torch.float32),
        (torch.zeros(()), torch.float32),
        (torch.zeros(0, 5000), torch.float32),
        (torch.zeros(63, 64).bfloat16(), torch.float32),
        (torch.zeros(5000).double(), torch.float64),
        (torch.zeros(64, 64, dtype=torch.complex64), torch.complex64),
    ],
)
def test_small_tensors_vectors_and_complex_numbers(p, dtype):
    p = nn.Parameter(p)
    optimizer = onepass.AdamW([p], state_dtype=CODES)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {name: value.dtype for name, value in optimizer.state[p].items()} == {
        "step": torch.float32,
        "exp_avg": dtype,
        "exp_avg_sq": dtype,
    }


def test_the_states_and_their_bytes():
    p = nn.Parameter(torch.zeros(512, 512))
    optimizer = onepass.AdamW([p], state_dtype=CODES)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = {name: value for name, value in optimizer.state[p].items() if name != "step"}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "exp_avg": (CODES, (512, 512)),
        "exp_avg_scale": (SCALES, (512, 16)),
        "exp_avg_sq": (CODES, (512, 512)),
        "exp_avg_sq_scale": (SCALES, (512, 16)),
    }
    assert sum(value.nbytes for value in state.values()) / p.numel() == 2.0625
    assert all(type(value) is torch.Tensor for value in state.values())


def test_groups_may_have_their_own():
    p, q = leaves(shapes=[(64, 128), (64, 128)])
    optimizer = onepass.AdamW([{"params": [p], "state_dtype": CODES, "rounding_seed": 3}, {"params": [q]}])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == CODES
    assert optimizer.state[q]["exp_avg"].dtype == torch.float32


# -- random bits -----------------------------------------------------------------------------------------------------


def test_the_seed_and_the_generators():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Pair(onepass.AdamW, leaves(shapes=[(64, 128)]), seed=1)
    second = Pair(onepass.AdamW, leaves(shapes=[(64, 128)]), seed=2**64 - 1)
    first.step()
    second.step()
    codes = [pair.ours.state[pair.params[0]]["exp_avg"].view(torch.uint8) for pair in (first, second)]
    assert not torch.equal(*codes)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1"])
def test_bad_seeds(seed):
    p = nn.Parameter(torch.zeros(64, 128))
    with pytest.raises(ValueError, match="AdamW: group 0: rounding_seed must be an int"):
        onepass.AdamW([p], state_dtype=CODES, rounding_seed=seed)
    optimizer = onepass.AdamW([p], state_dtype=CODES)
    with pytest.raises(ValueError, match="AdamW: group 1: rounding_seed must be an int"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "rounding_seed": seed})
    assert len(optimizer.param_groups) == 1


def encode(values, coding="signed_values", key=1, first_row=0):
    codes = torch.zeros(values.shape, dtype=CODES)
    scales = torch.zeros((values.shape[0], block_states.scales_in_row(values.shape)), dtype=SCALES)
    onepass._core.encode_blocks(values, coding, key, 0, first_row, codes, scales)
    decoded = torch.empty_like(values)
    onepass._core.decode_blocks(codes, scales, coding, decoded)
    return decoded


@pytest.mark.parametrize("length", [32, 77])
def test_indices_above_32_bits(length):
    """The random bits of a shard that holds element 2^32."""
    values = torch.randn(9, length, generator=torch.Generator().manual_seed(0))
    first_row = (1 << 32) // length - 4
    codes, scales = blocks.encoded(values.numpy(), "signed_values", 1, 0, first_row)
    wanted = torch.from_numpy(blocks.decoded(codes, scales, "signed_values"))
    assert bits(encode(values, first_row=first_row)) == bits(wanted)
    assert bits(encode(values, first_row=first_row)) != bits(encode(values))


@pytest.mark.parametrize("coding", ["signed_values", "magnitudes", "squares"])
@pytest.mark.parametrize("where", [448.0, 300.3, 97.25, 1.01, 0.0171, 0.0101, 0.0021, 2.0**-20])
def test_rounding_is_unbiased(coding, where):
    """The mean of a million draws is within 4.5 standard errors of the value, also where codes are denormal."""
    draws = 1_000_000
    values = torch.full((draws // 31, 32), where)
    values[:, 0] = 448.0  # the scale is 1
    stored = encode(values if coding != "squares" else values**2, coding, key=99)[:, 1:]
    stored = (stored.sqrt() if coding == "squares" else stored).double().flatten()
    codes = np.unique(stored.numpy())
    assert len(codes) <= 2
    if coding != "signed_values" and where < 2.0**-9:
        assert codes == [2.0**-9]  # never zero
        return
    step = codes[-1] - codes[0]
    fraction = (where - codes[0]) / step if step else 0.0
    error = step * math.sqrt(fraction * (1 - fraction) / len(stored)) + step * 2.0**-20
    assert abs(stored.mean().item() - where) <= 4.5 * error + where * 2.0**-23


def chi_square_fits(counts, expected):
    """Whether counts fit, at 4.5 standard deviations of the chi-square's normal approximation."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("distance", [1, 2, 15, 16, 31, 32, 1024])
@pytest.mark.parametrize("state", [0, 1])
def test_neighbours_are_independent(distance, state):
    """Pairs of the upper 4 random bits of elements at a distance are equally frequent."""
    index = np.arange(1 << 20)
    bits16 = blocks.random_bits(stochastic.random_key(0, 1, 0), state, index, index - index % 32) >> 16
    pairs = bits16[:-distance] * 16 + bits16[distance:]
    counts = np.bincount(pairs, minlength=256)
    assert chi_square_fits(counts, np.full(256, len(pairs) / 256))


@pytest.mark.parametrize("what", ["steps", "parameters", "states", "seeds"])
def test_different_keys_are_independent(what):
    index = np.arange(1 << 20)
    begin = index - index % 32

    def draw(number):
        key = {
            "steps": lambda: stochastic.random_key(0, 1 + number, 0),
            "parameters": lambda: stochastic.random_key(0, 1, number),
            "states": lambda: stochastic.random_key(0, 1, 0),
            "seeds": lambda: stochastic.random_key(number, 1, 0),
        }[what]()
        return blocks.random_bits(key, number if what == "states" else 0, index, begin) >> 16

    for other in (1, 2, 3):
        counts = np.bincount(draw(0) * 16 + draw(other), minlength=256)
        assert chi_square_fits(counts, np.full(256, len(index) / 256))


# -- every number ----------------------------------------------------------------------------------------------------


def test_every_code_with_every_scale():
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 8)
    decodable = slice(0, 246)  # larger scales cannot be written; 0 decodes as the smallest number
    for coding in ("signed_values", "magnitudes", "squares"):
        values = torch.empty(codes.shape)
        onepass._core.decode_blocks(codes.view(CODES), scales.view(SCALES), coding, values)
        expected = blocks.decoded(codes.numpy(), scales.numpy(), coding)
        assert bits(values[decodable]) == bits(torch.from_numpy(expected)[decodable])


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["signed_values", "magnitudes", "squares"])
def test_numbers_of_every_exponent(coding):
    """2^16 numbers of each exponent, with all kinds of neighbours."""
    generator = np.random.default_rng(3)
    for sign in (0, 1) if coding == "signed_values" else (0,):
        for exponent in range(256):
            mantissas = generator.integers(0, 1 << 23, 1 << 14, dtype=np.uint32)
            values = (mantissas | np.uint32(exponent << 23 | sign << 31)).view(np.float32).reshape(64, 256)
            with np.errstate(all="ignore"):
                values[:, ::32] *= np.float32(2.0) ** generator.integers(0, 3, (64, 8)).astype(np.float32)
            codes = torch.zeros(values.shape, dtype=CODES)
            scales = torch.zeros((64, 8), dtype=SCALES)
            onepass._core.encode_blocks(torch.from_numpy(values), coding, 7, 0, 0, codes, scales)
            expected, expected_scales = blocks.encoded(values, coding, 7)
            np.testing.assert_array_equal(scales.view(torch.uint8).numpy(), expected_scales)
            np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), expected)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def saved_and_read(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_bits(optimizer, params):
    found = []
    for p in params:
        state = optimizer.state[p]
        found.append({name: bits(v.view(torch.uint8) if v.element_size() == 1 else v) for name, v in state.items()})
    return found


@each_row
def test_resumed(row):
    params = leaves()
    optimizer = row.ours(params, **row.full, state_dtype=CODES, rounding_seed=5)
    torch.manual_seed(0)
    grads = [[torch.randn_like(p) for p in params] for _ in range(5)]

    def run(own, own_params, steps):
        for step in steps:
            for p, grad in zip(own_params, grads[step], strict=True):
                p.grad = grad.clone()
            own.step()

    run(optimizer, params, range(3))
    checkpoint = saved_and_read(optimizer)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = row.ours(others, **row.full, rounding_seed=1)
    resumed.load_state_dict(checkpoint)
    run(optimizer, params, range(3, 5))
    run(resumed, others, range(3, 5))
    assert [bits(p) for p in params] == [bits(p) for p in others]
    assert state_bits(optimizer, params) == state_bits(resumed, others)
    duplicate = copy.deepcopy(optimizer)
    assert state_bits(duplicate, duplicate.param_groups[0]["params"]) == state_bits(optimizer, params)


@each_row
def test_a_checkpoint_of_torchs_is_encoded(row):
    params = leaves(shapes=[(64, 128), (70, 77), (30,)])
    theirs = row.theirs(params, **{k: v for k, v in row.full.items() if k not in row.own})
    for p in params:
        p.grad = torch.randn_like(p)
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    optimizer = row.ours(params, **row.full, state_dtype=CODES)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["state_dtype"] == CODES
    states = RULES[optimizer.rule][1]
    for number, p in enumerate(params):
        for name in (name for name in states if name in theirs.state[p]):
            wanted, own = theirs.state[p][name], optimizer.state[p]
            if wanted is None:
                continue
            if number == 2:
                assert torch.equal(own[name], wanted)
                continue
            key = stochastic.random_key(0, 1 if "step" in theirs.state[p] else 0, number)
            expected = blocks.encoded(wanted.numpy(), block_states.codings()[name], key, states.index(name))
            np.testing.assert_array_equal(own[name].view(torch.uint8).numpy(), expected[0])
            np.testing.assert_array_equal(own[name + "_scale"].view(torch.uint8).numpy(), expected[1])
    optimizer.step()


DTYPES = [None, torch.float32, torch.bfloat16, torch.float16, CODES]


@pytest.mark.parametrize("loads", DTYPES, ids=str)
@pytest.mark.parametrize("saves", DTYPES, ids=str)
@each_row
def test_loaded_into_an_optimizer_of_another_dtype(row, saves, loads):
    """The states are converted, as `convert_state_dict` does; without an argument they stay as they were saved."""
    params = leaves(shapes=[(64, 128), (70, 77), (30,)])
    optimizer = row.ours(params, **row.full, state_dtype=saves)
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = row.ours(others, **row.full, state_dtype=loads)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0].get("state_dtype") == (loads or saves)
    converted = before if loads is None else onepass.convert_state_dict(before, loads)
    for number, p in enumerate(others):
        wanted = {k: v for k, v in converted["state"].get(number, {}).items() if v is not None}
        own = {k: v for k, v in loaded.state.get(p, {}).items() if v is not None}
        assert own.keys() == wanted.keys()
        for name, value in wanted.items():
            assert own[name].dtype == value.dtype, name
            assert bits(own[name].reshape(-1).view(torch.uint8)) == bits(value.reshape(-1).view(torch.uint8)), name
    again = row.ours([nn.Parameter(p.detach().clone()) for p in params], **row.full)
    again.load_state_dict(copy.deepcopy(converted))
    for own in (loaded, again):
        for p in own.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        own.step()
    for p, q in zip(others, again.param_groups[0]["params"], strict=True):
        assert bits(p.detach()) == bits(q.detach())
    assert str(saved["param_groups"]) == str(before["param_groups"])


def trained(**kwargs):
    params = leaves(shapes=[(64, 128), (30,)])
    optimizer = onepass.AdamW(params, state_dtype=CODES, **kwargs)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer, params


def spoil(saved, what):
    state = saved["state"][0]
    if what == "missing scales":
        del state["exp_avg_scale"]
    elif what == "scales of another shape":
        state["exp_avg_scale"] = state["exp_avg_scale"][:, :3]
    elif what == "scales of another dtype":
        state["exp_avg_scale"] = state["exp_avg_scale"].view(torch.uint8)
    elif what == "a scale that is too large":
        state["exp_avg_scale"].view(torch.uint8)[2, 2] = 246
    elif what == "a code that is NaN":
        state["exp_avg_sq"].view(torch.uint8)[2, 2] = 0x7F
    elif what == "codes of a vector":
        state["exp_avg"] = state["exp_avg"].flatten()


SPOILED = [
    "missing scales",
    "scales of another shape",
    "scales of another dtype",
    "a scale that is too large",
    "a code that is NaN",
    "codes of a vector",
]


@pytest.mark.parametrize("value", [math.nan, math.inf, 6e20])
def test_a_checkpoint_with_blocks_that_are_nan(value):
    """It is what the kernels make of NaN, infinite and too large elements, so it can be loaded and converted."""
    optimizer, params = trained()
    params[0].grad[3, 40] = value
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    resumed = onepass.AdamW([nn.Parameter(p.detach().clone()) for p in params], state_dtype=CODES)
    resumed.load_state_dict(saved)
    assert state_bits(resumed, params_of(resumed)) == state_bits(optimizer, params)
    values = onepass.convert_state_dict(saved, state_dtype=torch.float32)["state"][0]["exp_avg_sq"]
    nan = torch.zeros(64, 128, dtype=torch.bool)
    nan[3, 32:64] = True
    assert torch.equal(values.isnan(), nan)


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_checkpoint_is_refused(what):
    optimizer, params = trained()
    before = state_bits(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved, what)
    with pytest.raises(ValueError, match=r"AdamW: parameter 0 of group 0: its state exp_avg"):
        optimizer.load_state_dict(saved)
    assert state_bits(optimizer, params) == before


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("exp_avg", lambda state: state[:, :5], "its state exp_avg must be strided and have the parameter's shape"),
        ("exp_avg_sq", torch.Tensor.flatten, "its state exp_avg_sq must be strided and have the parameter's shape"),
        ("exp_avg", torch.Tensor.to_sparse, "its state exp_avg must be strided .*, but has torch.sparse_coo"),
        ("step", lambda _: torch.tensor(math.nan), "its state step must be >= 0 and finite, got nan"),
        ("step", lambda _: -1, "its state step must be >= 0 and finite, got -1"),
        ("step", lambda _: torch.ones(2), "its state step must be one number"),
    ],
)
def test_a_state_that_cannot_be_encoded_is_refused(name, wrong, message):
    """Before anything is loaded: the groups, and the states of the parameter before it."""
    optimizer, params = trained()
    second = nn.Parameter(torch.ones(64, 128))
    optimizer.add_param_group({"params": [second]})
    plain = onepass.AdamW([{"params": params}, {"params": [second]}], lr=0.875)
    second.grad = torch.ones_like(second)
    plain.step()
    saved = plain.state_dict()
    saved["state"][2][name] = wrong(saved["state"][2][name])
    before, groups = state_bits(optimizer, params), str(optimizer.param_groups)
    with pytest.raises(ValueError, match=f"AdamW: parameter 0 of group 1: {message}"):
        optimizer.load_state_dict(saved)
    assert state_bits(optimizer, params) == before
    assert str(optimizer.param_groups) == groups
    assert second not in optimizer.state


def test_a_state_that_is_no_dict_is_refused():
    optimizer, params = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.875
    saved["state"][1] = None
    before = state_bits(optimizer, params)
    with pytest.raises(ValueError, match="AdamW: parameter 1 of group 0: its state must be a dict, got the NoneType"):
        optimizer.load_state_dict(saved)
    assert state_bits(optimizer, params) == before
    assert optimizer.param_groups[0]["lr"] != 0.875


@pytest.mark.parametrize("what", SPOILED[:3])
def test_spoiled_states_are_refused_by_the_step(what):
    optimizer, params = trained()
    saved = {"state": {0: optimizer.state[params[0]]}}
    spoil(saved, what)
    before = bits(params[0])
    with pytest.raises(ValueError, match=r"AdamW: parameter 0 of group 0.*its state exp_avg"):
        optimizer.step()
    assert bits(params[0]) == before


def test_codes_whose_rows_are_divided_are_refused():
    optimizer, params = trained()
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].view(torch.uint8).t().contiguous().t().view(CODES)
    with pytest.raises(ValueError, match="its state exp_avg is not packed with its first dimension outermost"):
        optimizer.step()


# -- with everything else --------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor that kernels do not step."""


@each_row
def test_where_torchs_implementation_steps(row):
    """Codes are decoded, stepped by torch and encoded again, with the random bits of the kernels."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    p, q = (start.clone().as_subclass(Subclass).requires_grad_() for _ in range(2))
    optimizer, twin = row.ours([p], **row.full, state_dtype=CODES), row.ours([q], **row.full)
    states = RULES[optimizer.rule][1]
    for step in range(3):
        grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step + 1)).as_subclass(Subclass)
        p.grad, q.grad = grad, grad.clone()
        own = optimizer.state[p]
        for name in (name for name in states if step and own.get(name) is not None):
            twin.state[q][name] = block_states.decoded(own[name], own[name + "_scale"], name)
        optimizer.step()
        twin.step()
        assert bits(p.detach().as_subclass(torch.Tensor)) == bits(q.detach().as_subclass(torch.Tensor))
        for name in (name for name in states if twin.state[q].get(name) is not None):
            values = twin.state[q][name].as_subclass(torch.Tensor).numpy()
            key = stochastic.random_key(0, step + 1, 0)
            codes, scales = blocks.encoded(values, block_states.codings()[name], key, states.index(name))
            np.testing.assert_array_equal(own[name].as_subclass(torch.Tensor).view(torch.uint8).numpy(), codes)
            np.testing.assert_array_equal(
                own[name + "_scale"].as_subclass(torch.Tensor).view(torch.uint8).numpy(), scales
            )


@pytest.mark.parametrize("arguments", [{}, {"max_norm": 1.0}], ids=["plain", "max_norm"])
@each_row
def test_a_group_that_kernels_and_torchs_implementation_share(row, arguments):
    """A step counts once, and what the kernels step has the bits that it has alone."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    alone, mixed = ([start.clone().requires_grad_() for _ in range(2)] for _ in range(2))
    mixed[1] = mixed[1].detach().as_subclass(Subclass).requires_grad_()
    twin, optimizer = (row.ours(params, **row.full, **arguments, state_dtype=CODES) for params in (alone, mixed))
    for step in range(3):
        for p, q in zip(alone, mixed, strict=True):
            p.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step + 1))
            q.grad = p.grad.as_subclass(type(q))
        twin.step()
        optimizer.step()
        assert {row.path for row in onepass.explain(optimizer)} == {"kernel", "torch"}
        assert bits(mixed[0].detach()) == bits(alone[0].detach())
        assert state_bits(optimizer, mixed[:1]) == state_bits(twin, alone[:1])


@pytest.mark.cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("master", ["split", "float32"])
@each_row
def test_with_masters(row, master, isa):
    """The masters have the bits of float32 parameters with the same 8-bit states, also ahead and on threads."""
    onepass._core.force_isa(isa)
    onepass._core.force_tuning("intel" if master == "split" else "amd")
    torch.set_num_threads(3)
    values = leaves(torch.bfloat16, [(64, 128), (70, 77), (37, 1003), (3, 3000)])
    with torch.no_grad():
        values[0][1, :5] = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-40])
    wide = [nn.Parameter(p.detach().float()) for p in values]
    optimizer = row.ours(values, **row.full, state_dtype=CODES, master=master)
    twin = row.ours(wide, **row.full, state_dtype=CODES)
    states = RULES[optimizer.rule][1]
    name = {"split": "master_low", "float32": "master"}[master]
    for step in range(4):
        for p, q in zip(values, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        for p, q in zip(values, wide, strict=True):
            own, wanted = onepass.optimizers.master.master_of(p, optimizer.state[p], name), q.detach()
            assert bits(own[~wanted.isnan()]) == bits(wanted[~wanted.isnan()])
            assert torch.equal(own.isnan(), wanted.isnan())
            for key in (key for key in states if twin.state[q].get(key) is not None):
                for part in (key, key + "_scale"):
                    own, wanted = optimizer.state[p][part], twin.state[q][part]
                    assert torch.equal(own.view(torch.uint8), wanted.view(torch.uint8))


@each_row
def test_with_a_tail(row):
    """Clipping, an average, a copy and zeroed gradients change nothing else."""
    model, plain = nn.ParameterList(leaves()), nn.ParameterList(leaves())
    average = AveragedModel(model, decay=0.9)
    low = [p.detach().bfloat16() for p in model]
    optimizer = row.ours(
        model, **row.full, state_dtype=CODES, max_norm=1.0, average=average, copy_to=low, zero_grad=True
    )
    bare = row.ours(plain, **row.full, state_dtype=CODES)
    averages = [p.detach().double() for p in plain]
    for step in range(3):
        for p, q in zip(model, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        for q in plain:
            q.grad = (q.grad.double() * optimizer.last_step.coefficient).float()
        bare.step()
        average.update_parameters(model)
        for i, (p, q) in enumerate(zip(model, plain, strict=True)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
            averages[i] = p.detach().double() if step == 0 else averages[i] + 0.1 * (p.detach().double() - averages[i])
            assert not p.grad.count_nonzero()
            assert torch.equal(low[i], p.detach().bfloat16())
    for mine, wanted in zip(average.module, averages, strict=True):
        torch.testing.assert_close(mine.detach().double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_skipped_step_keeps_the_states():
    for row in DENSE:
        params = leaves(shapes=[(64, 128)])
        optimizer = row.ours(params, **row.full, state_dtype=CODES, skip_nonfinite=True)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        before, groups = state_bits(optimizer, params), copy.deepcopy(optimizer.state_dict()["param_groups"])
        params[0].grad[0, 0] = math.nan
        optimizer.step()
        assert optimizer.last_step.skipped
        assert state_bits(optimizer, params) == before
        assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("cls", [onepass.SparseAdam, onepass.Lion, onepass.AdamW])
def test_sparse_gradients(cls):
    """Only the touched rows are decoded and encoded."""
    p = nn.Parameter(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)))
    optimizer = cls([p], lr=0.01, state_dtype=CODES)
    twin = nn.Parameter(p.detach().clone())
    wide = cls([twin], lr=0.01)
    states = [name for name in RULES[optimizer.rule][1] if name != "max_exp_avg_sq"]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        indices, values = torch.randint(300, (1, 60), generator=generator), torch.randn(60, 40, generator=generator)
        grad = torch.sparse_coo_tensor(indices, values, (300, 40), check_invariants=True)
        p.grad, twin.grad = grad, grad.clone()
        before = copy.deepcopy(dict(optimizer.state[p]))
        for name in states:
            if step:
                old = block_states.decoded(before[name], before[name + "_scale"], name)
                wide.state[twin][name].copy_(old)
        optimizer.step()
        wide.step()
        assert bits(p) == bits(twin)
        touched = indices.unique()
        for name in states:
            codes = optimizer.state[p][name].view(torch.uint8)
            wanted, _ = blocks.encoded(
                wide.state[twin][name].numpy(),
                block_states.codings()[name],
                stochastic.random_key(0, step + 1, 0),
                states.index(name),
            )
            np.testing.assert_array_equal(codes[touched].numpy(), wanted[touched])
            if step:
                rest = torch.ones(300, dtype=torch.bool).index_fill(0, touched, False)
                assert torch.equal(codes[rest], before[name].view(torch.uint8)[rest])


def test_a_sparse_momentum_buffer():
    p = nn.Parameter(torch.zeros(300, 40))
    optimizer = onepass.SGD([p], lr=0.1, momentum=0.9, state_dtype=CODES)
    p.grad = torch.ones(300, 40).to_sparse(1)
    with pytest.raises(ValueError, match="whose sparse gradients torch's implementation steps"):
        optimizer.step()
    assert not p.count_nonzero()


def test_a_gradient_with_two_sparse_dimensions():
    p = nn.Parameter(torch.zeros(64, 64, 2))
    optimizer = onepass.SparseAdam([p], state_dtype=CODES)
    p.grad = torch.ones(64, 64, 2).to_sparse(2)
    with pytest.raises(ValueError, match="a sparse gradient with several sparse dimensions cannot step 8-bit states"):
        optimizer.step()


def test_within_lookahead():
    p, q = leaves(shapes=[(64, 128)])[0], leaves(shapes=[(64, 128)])[0]
    ahead = onepass.Lookahead(onepass.AdamW([p], state_dtype=CODES), k=2)
    plain = onepass.AdamW([q], state_dtype=CODES)
    slow = q.detach().clone()
    for step in range(1, 5):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        q.grad = p.grad.clone()
        ahead.step()
        plain.step()
        if step % 2 == 0:
            with torch.no_grad():
                slow += 0.5 * (q - slow)
                q.copy_(slow)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_with_grad_scaler():
    p, q = leaves(shapes=[(64, 128)])[0], leaves(shapes=[(64, 128)])[0]
    scaled, plain = onepass.AdamW([p], state_dtype=CODES), onepass.AdamW([q], state_dtype=CODES)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
        scaler.scale((p * inputs).sum()).backward()
        (q * inputs).sum().backward()
        scaler.step(scaled)
        scaler.update()
        plain.step()
        scaled.zero_grad()
        plain.zero_grad()
        assert bits(p) == bits(q)
    assert state_bits(scaled, [p]) == state_bits(plain, [q])


@pytest.mark.parametrize("calls_step", [True, False])
@each_row
def test_step_in_backward(row, calls_step):
    """The bits of a step after the backward pass: of several parameters and groups, also in a resumed run."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 128))
    plain = copy.deepcopy(model)

    def optimizer_of(net):
        groups = [{"params": net[:2].parameters()}, {"params": net[3].parameters()}]
        return row.ours(groups, **row.full, state_dtype=CODES)

    optimizer, fused = optimizer_of(plain), optimizer_of(model)
    handle = onepass.step_in_backward(fused)
    for step in range(5):
        inputs = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        plain(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if calls_step:
            fused.step()
        if step == 2:
            handle.remove()
            saved = copy.deepcopy(fused.state_dict())
            fused = optimizer_of(model)
            fused.load_state_dict(saved)
            handle = onepass.step_in_backward(fused)
        params, own = list(plain.parameters()), list(model.parameters())
        assert [bits(p.detach()) for p in own] == [bits(p.detach()) for p in params]
        assert state_bits(fused, own) == state_bits(optimizer, params)


def test_training_is_as_with_float32():
    """The last losses of a regression are the same within 1 %."""
    losses = {}
    for state_dtype in (None, CODES):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        target = torch.randn(64, 64) / 8
        optimizer = onepass.AdamW(model.parameters(), lr=3e-3, state_dtype=state_dtype)
        total = 0.0
        for step in range(150):
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x @ target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() if step >= 100 else 0.0
        losses[state_dtype] = total / 50
    assert losses[CODES] == pytest.approx(losses[None], rel=0.01)


# -- conversion of checkpoints ---------------------------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_converted_to_other_dtypes(row, dtype):
    params = leaves(shapes=[(64, 128), (40, 3, 7, 7), (30,)])
    optimizer = row.ours(params, **row.full, state_dtype=CODES)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    converted = onepass.convert_state_dict(saved, dtype)
    for key, state in converted["state"].items():
        held = optimizer.state[params[key]]
        assert set(state) == {name for name in held if not name.endswith("_scale")}
        for name, value in state.items():
            if name not in block_states.codings() or value is None:
                assert value is None or torch.equal(value, held[name])
                continue
            wanted = held[name]
            if wanted.dtype == CODES:
                wanted = block_states.decoded(wanted, held[name + "_scale"], name)
            assert torch.equal(value, wanted.to(dtype or torch.float32))
            assert value.dtype == (dtype or torch.float32)
    assert str(before) == str(saved)
    if dtype is None:
        assert not {"state_dtype", "rounding_seed"} & converted["param_groups"][0].keys()
        others = [nn.Parameter(p.detach().clone()) for p in params]
        theirs = row.theirs(others, **{k: v for k, v in row.full.items() if k not in row.own})
        theirs.load_state_dict(converted)
        for q in others:
            q.grad = torch.ones_like(q)
        theirs.step()
    else:
        other = row.ours(params, **row.full)
        other.load_state_dict(converted)
        assert other.param_groups[0]["state_dtype"] == dtype
        other.step()


def test_states_that_cannot_have_8_bits_stay_as_they_are():
    """Adan has states of Adam's names, and one that is no average."""
    params = leaves(shapes=[(64, 128), (70, 77)])
    optimizer = onepass.Adan(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    converted = onepass.convert_state_dict(optimizer.state_dict(), CODES)
    assert "state_dtype" not in converted["param_groups"][0]
    for number, p in enumerate(params):
        for name, value in optimizer.state[p].items():
            assert torch.equal(converted["state"][number][name], value)
    onepass.Adan(params).load_state_dict(converted)


@each_row
def test_converted_to_8_bits_as_if_loaded(row):
    params = leaves(shapes=[(64, 128), (70, 77), (30,)])
    plain = row.ours(params, **row.full)
    for p in params:
        p.grad = torch.randn_like(p)
    plain.step()
    loaded = row.ours(params, **row.full, state_dtype=CODES)
    loaded.load_state_dict(plain.state_dict())
    converted = row.ours(params, **row.full)
    converted.load_state_dict(onepass.convert_state_dict(plain.state_dict(), CODES))
    assert state_bits(loaded, params) == state_bits(converted, params)
    converted.step()


def of_bitsandbytes(values, signed):
    """The codes, map and scales of bitsandbytes' format, for values in blocks of 256."""
    qmap = torch.linspace(-1, 1, 256) if signed else torch.linspace(0, 1, 256)
    flat = values.flatten()
    blocks_of = nn.functional.pad(flat, (0, -flat.numel() % 256)).view(-1, 256)
    absmax = blocks_of.abs().amax(1)
    codes = (blocks_of / absmax[:, None]).flatten()[: flat.numel(), None].sub(qmap).abs().argmin(1)
    return codes.to(torch.uint8).view(values.shape), qmap, absmax


@pytest.mark.parametrize("nested", [True, False])
def test_states_of_bitsandbytes(nested):
    """Later versions keep the states in a dict of their own."""

    def saved(step, states):
        return {"step": step, "__bnb_optimizer_quant_state__": states} if nested else {"step": step, **states}

    torch.manual_seed(0)
    m, v = torch.randn(50, 77), torch.rand(50, 77)
    state1, qmap1, absmax1 = of_bitsandbytes(m, True)
    state2, qmap2, absmax2 = of_bitsandbytes(v, False)
    names = {"state1": state1, "qmap1": qmap1, "absmax1": absmax1, "state2": state2, "qmap2": qmap2}
    names["absmax2"] = absmax2
    small = saved(4, {"state1": m[:2], "state2": v[:2]})
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0, 1]}
    theirs = {"state": {0: saved(4, names), 1: small}, "param_groups": [group]}
    converted = onepass.convert_state_dict(theirs)
    scale1 = absmax1.repeat_interleave(256)[: m.numel()].view(m.shape)
    assert torch.equal(converted["state"][0]["exp_avg"], qmap1[state1.long()] * scale1)
    assert (converted["state"][0]["exp_avg"] - m).abs().max() <= m.abs().max() / 255
    assert (converted["state"][0]["exp_avg_sq"] - v).abs().max() <= v.abs().max() / 510 * 1.001
    assert torch.equal(converted["state"][1]["exp_avg"], m[:2])
    params = [nn.Parameter(torch.zeros(50, 77)), nn.Parameter(torch.zeros(2, 77))]
    for optimizer in (torch.optim.AdamW(params), onepass.AdamW(params, state_dtype=CODES)):
        optimizer.load_state_dict(copy.deepcopy(converted))
        assert optimizer.state[params[0]]["step"] == 4
        assert not any("bnb" in name for name in optimizer.state[params[0]])
    back = onepass.convert_state_dict(converted, layout="bitsandbytes")
    assert torch.equal(back["state"][0]["state1"], converted["state"][0]["exp_avg"])
    assert back["state"][1]["step"] == 4
    again = onepass.convert_state_dict(back)
    assert torch.equal(again["state"][0]["exp_avg_sq"], converted["state"][0]["exp_avg_sq"])
    del names["absmax2"]
    theirs["state"][0] = saved(4, names)
    with pytest.raises(ValueError, match="state of parameter 0: state2 has 8 bits, but no qmap2 and absmax2 that fit"):
        onepass.convert_state_dict(theirs)


def test_states_for_bitsandbytes_are_contiguous():
    """Its steps make parameters contiguous, and its GPU kernels read states in the order of memory."""
    params = [torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last), torch.randn(70, 64).t()]
    params = [nn.Parameter(p) for p in params]
    optimizer = onepass.AdamW(params)
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    saved = onepass.convert_state_dict(optimizer.state_dict(), layout="bitsandbytes")
    for number, p in enumerate(params):
        for name, ours in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
            state, want = saved["state"][number][name], optimizer.state[p][ours]
            assert not want.is_contiguous()
            assert torch.equal(state.as_strided((p.numel(),), (1,)), want.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, CODES], ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "LBFGS"], ids=lambda row: row.name)
def test_what_is_converted_loads(row, dtype):
    """Into the class of the checkpoint, also before its first step; with the dtypes of one with this state_dtype."""

    def created(**arguments):
        shapes = [(), (70, 64), (5,)] if not row.takes_matrices else [(70, 64), (64, 4)]
        params = [torch.ones(shape, requires_grad=True) for shape in shapes if shape or not row.wants_sparse]
        return row.ours(params, **row.full, **arguments), params

    for steps in (0, 1):
        optimizer, params = created()
        for p in params * steps:
            p.grad = torch.ones_like(p).to_sparse(1) if row.wants_sparse else torch.ones_like(p)
        onepass.Lookahead(optimizer, k=1).step()  # which adds a state of its own
        converted = onepass.convert_state_dict(optimizer.state_dict(), dtype)
        other, params = created()
        if row.name == "StableAdamW" and dtype == CODES:  # its checkpoints look like those of Adam
            with pytest.raises(ValueError, match="because StableAdamW has no 8-bit states"):
                other.load_state_dict(converted)
            continue
        other.load_state_dict(converted)
        if dtype == CODES and row.name not in NAMES_8BIT:
            assert "state_dtype" not in other.param_groups[0]
            continue
        wanted, others = created(state_dtype=dtype)
        wanted.load_state_dict(optimizer.state_dict())
        for p, q in zip(params, others, strict=True):
            for name, value in wanted.state.get(q, {}).items():
                assert not isinstance(value, torch.Tensor) or other.state[p][name].dtype == value.dtype, name


def test_conversions_that_there_are_not():
    optimizer, _ = trained()
    for bad in ({}, torch.nn.Linear(2, 2).state_dict(), optimizer):
        with pytest.raises(ValueError, match=r"state_dict must be a dict with the keys state, param_groups, got"):
            onepass.convert_state_dict(bad)
    with pytest.raises(
        ValueError, match=r"^convert_state_dict: state_dtype must be one of \(torch.float32, .* or None, got"
    ):
        onepass.convert_state_dict(optimizer.state_dict(), torch.int8)
    with pytest.raises(ValueError, match=r"^convert_state_dict: layout must be 'torch' or 'bitsandbytes'"):
        onepass.convert_state_dict(optimizer.state_dict(), layout="torchao")
    for dtype in (torch.bfloat16, CODES):
        text = f"state_dtype must be None or torch.float32 with layout='bitsandbytes', got {dtype}"
        with pytest.raises(ValueError, match=f"^convert_state_dict: {text}$"):
            onepass.convert_state_dict(optimizer.state_dict(), dtype, layout="bitsandbytes")
    plain, float32 = (
        onepass.convert_state_dict(optimizer.state_dict(), dtype, layout="bitsandbytes")
        for dtype in (None, torch.float32)
    )
    torch.testing.assert_close(float32, plain, rtol=0, atol=0)
    sgd = onepass.SGD([p := nn.Parameter(torch.zeros(64, 64))], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    sgd.step()
    with pytest.raises(ValueError, match="needs the states of Adam or Lion"):
        onepass.convert_state_dict(sgd.state_dict(), layout="bitsandbytes")
    spoiled = copy.deepcopy(optimizer.state_dict())
    del spoiled["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match="state of parameter 0: its state exp_avg has 8 bits"):
        onepass.convert_state_dict(spoiled)
    for step in (math.nan, -1.0, "text", None, torch.ones(2)):
        spoiled = copy.deepcopy(sgd.state_dict())
        spoiled["state"][0]["step"] = step
        with pytest.raises((TypeError, ValueError), match=r"^state of parameter 0: its state step must be"):
            onepass.convert_state_dict(spoiled, CODES)
    spoiled["state"][0] = None
    text = r"^convert_state_dict: state of parameter 0 must be a dict, got the NoneType"
    with pytest.raises(ValueError, match=text):
        onepass.convert_state_dict(spoiled)
