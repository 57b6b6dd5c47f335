"""The same bits on every instruction set and number of threads, and across a checkpoint."""

import copy
import itertools

import onepass
import pytest
import torch
from cases import copies, each_case, each_case_and_own_case, each_row, each_row_alone, give, gradients, model
from contract import through_a_file
from machines import ISAS, TUNINGS
from reference import Trajectory, bits, params_of

pytestmark = pytest.mark.usefixtures("kernels_only")


def everything(row, optimizer) -> list[bytes]:
    """Bits of all parameters, states and step counters."""
    held = []
    for p in params_of(optimizer):
        state = optimizer.state.get(p, {})
        held += [bits(p)] + [bits(state[name]) for name in ("step", *row.states) if name in state]
    return held


# -- machines --------------------------------------------------------------------------------------------------------

# The core wakes one thread for every 2 MiB that a step moves. These move 10 MiB and more, three threads' worth.
LARGE = [
    (torch.float32, (300_007,)),
    (torch.bfloat16, (1_000_003,)),
    (torch.float16, (411, 617)),
    (torch.float64, (100_001,)),
    *[(torch.float32, (n,)) for n in range(40)],
]


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@each_row
def test_instruction_sets_and_threads(row, state_dtype):
    params = [torch.randn(shape).to(dtype).requires_grad_() for dtype, shape in LARGE]
    params.append(torch.randn(257, 311).t().requires_grad_())  # not packed in the order of its gradient
    grads = [[torch.randn(p.shape).to(p.dtype) for p in params] for _ in range(3)]
    results = {}
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        onepass._core.force_isa(isa)
        assert onepass._core.isa() == isa
        onepass._core.force_tuning(TUNINGS[threads % len(TUNINGS)])
        torch.set_num_threads(threads)
        optimizer = row.ours(copies(params), **row.full, state_dtype=state_dtype)
        for step in grads:
            for p, grad in zip(params_of(optimizer), step, strict=True):
                p.grad = grad
            optimizer.step()
        results[isa, threads] = everything(row, optimizer)
    expected = results[ISAS[0], 1]
    assert expected[0] != bits(params[0])
    assert [key for key, result in results.items() if result != expected] == []


@each_case_and_own_case
def test_instruction_sets_every_flag(row, kwargs):
    params = model()
    grads = [gradients(params, step) for step in range(1, 6)]
    results = []
    for isa in ISAS:
        onepass._core.force_isa(isa)
        optimizer = row.ours(copies(params), **kwargs)
        for step in grads:
            give(optimizer, step)
            optimizer.step()
        results.append(everything(row, optimizer))
    assert all(result == results[0] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_row
def test_instruction_sets_every_bit_pattern(row, dtype):
    """NaN, infinities, denormals, ties of rounding: all that 16 bits can hold, and as many of float32's patterns.

    Which NaN comes out where two meet is the one thing that may differ: compilers may swap the sides of an addition.
    """
    patterns = torch.arange(1 << 16).to(torch.int16).view(dtype)
    if dtype == torch.float32:
        patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).to(torch.int32).view(dtype)
    p = patterns[torch.randperm(len(patterns))].clone().requires_grad_()
    results = []
    for isa in ISAS:
        onepass._core.force_isa(isa)
        optimizer = row.ours(copies([p]), **row.full)
        for grad in (patterns, patterns.flip(0)):
            give(optimizer, [grad])
            optimizer.step()
        (q,) = params_of(optimizer)
        for t in (q.detach(), *(optimizer.state[q][name] for name in row.states)):
            t[t.isnan()] = torch.nan
        results.append(everything(row, optimizer))
    assert all(result == results[0] for result in results)


@each_row_alone
def test_position_does_not_matter(row):
    """An element's bits depend neither on where its tensor is cut nor on where in it the element lies."""
    whole = [torch.randn(5000, requires_grad=True)]
    cuts = [0, 1, 1023, 1024, 1029, 3333, 5000]
    pieces = [whole[0].detach()[a:b].clone().requires_grad_() for a, b in itertools.pairwise(cuts)]
    one, many = row.ours(copies(whole), **row.full), row.ours(pieces, **row.full)
    for _ in range(4):
        grad = torch.randn(5000)
        give(one, [grad])
        give(many, [grad[a:b] for a, b in itertools.pairwise(cuts)])
        one.step()
        many.step()
    assert bits(params_of(one)[0]) == bits(torch.cat(pieces))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def run(optimizer, gradients) -> None:
    for step in gradients:
        give(optimizer, step)
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32], ids=str)
@each_case_and_own_case
def test_resume(row, kwargs, state_dtype):
    """Stopping at step 3 and going on from the state_dict is to the bit the same as not stopping."""
    params = [*model(), *model(torch.bfloat16), *model(torch.float64)]
    grads = [gradients(params, step) for step in range(1, 6)]
    straight = row.ours(copies(params), **kwargs, state_dtype=state_dtype)
    run(straight, grads)

    first = row.ours(copies(params), **kwargs, state_dtype=state_dtype)
    run(first, grads[:3])
    second = row.ours(copies(params_of(first)))  # with defaults: everything comes from the checkpoint
    carry = through_a_file if state_dtype is None else copy.deepcopy  # a copy takes a third of the time
    second.load_state_dict(carry(first.state_dict()))
    assert everything(row, second) == everything(row, first)
    run(second, grads[3:])
    assert everything(row, second) == everything(row, straight)
    for p in params_of(second):
        wanted = state_dtype or row.new_dtype(p.dtype)
        assert all(second.state[p][n].dtype == wanted for n in row.states if n in second.state[p])


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to_torch", "from_torch"])
@each_case
def test_exchange_with_torch(row, kwargs, direction):
    """A checkpoint goes over without a changed bit, and both go on to the same numbers."""
    params = model()
    grads = [gradients(params, step) for step in range(1, 7)]
    classes = (row.ours, row.theirs) if direction == "to_torch" else (row.theirs, row.ours)
    one = classes[0](copies(params), **kwargs)
    exact = Trajectory(row, one)
    for step in grads[:3]:
        run(one, [step])
        exact.step()
    other = classes[1](copies(params_of(one)))
    other.load_state_dict(through_a_file(one.state_dict()))
    assert everything(row, other) == everything(row, one)
    for step in grads[3:]:
        run(one, [step])
        run(other, [step])
        exact.step()
    for name in exact.names():
        largest = abs(exact.numbers(name)).max()
        assert abs(exact.of(one, name) - exact.of(other, name)).max() <= 8 * 2.0**-23 * largest
    for p, q in zip(params_of(one), params_of(other), strict=True):
        assert one.state[p].get("step") == other.state[q].get("step")


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_loaded_states_have_the_strides_of_their_parameters(state_dtype):
    """A checkpoint of a model that was not channels_last: other strides would make each step slower."""
    saved = onepass.AdamW([torch.randn(16, 8, 5, 7).requires_grad_()], amsgrad=True, state_dtype=state_dtype)
    (p,) = params_of(saved)
    p.grad = torch.randn_like(p)
    saved.step()
    channels_last = p.detach().clone(memory_format=torch.channels_last).requires_grad_()
    loaded = onepass.AdamW([channels_last], amsgrad=True)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    in_rows = p if state_dtype == torch.float8_e4m3fn else channels_last
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        held = loaded.state[channels_last][name]
        assert held.stride() == in_rows.stride()
        assert torch.equal(held.float(), saved.state[p][name].float())
    channels_last.grad = p.grad.clone(memory_format=torch.channels_last)
    saved.step()
    loaded.step()
    assert torch.equal(channels_last, p)
