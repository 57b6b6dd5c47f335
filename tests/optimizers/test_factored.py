"""Adafactor and CAME: the bits of a step, whatever the layout, the instruction set and the number of threads."""

import itertools

import onepass
import pytest
import torch
from cases import copies, give
from contract import through_a_file
from factored import ADAFACTOR, CAME, LARGE, LAYOUTS, everything, gradients, model, run
from machines import ISAS
from reference import bits, only_kernels, params_of

pytestmark = pytest.mark.usefixtures("one_thread")
each_row = pytest.mark.parametrize("row", [ADAFACTOR, CAME])
each_case = pytest.mark.parametrize(
    ("row", "kwargs"),
    [pytest.param(row, kw, id=f"{row.name}-{name}") for row in (ADAFACTOR, CAME) for name, kw in row.variants.items()],
)


@each_row
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(70, 90), (8, 7), (700, 3), (3, 1100), (5, 2000)], ids=str)
def test_layouts(row, shape, layout, grad_layout):
    """Where a matrix lies changes no bit, except that the blocks of a transposed one are others."""
    p, grad = torch.randn(shape), torch.randn(shape)
    in_order = LAYOUTS["transposed"](p) if layout == "transposed" else p
    plain = row.ours([in_order.detach().clone(memory_format=torch.preserve_format).requires_grad_()], **row.full)
    other = row.ours([LAYOUTS[layout](p).detach().requires_grad_()], **row.full)
    (q,) = params_of(other)
    assert q.stride() == LAYOUTS[layout](p).stride()
    for step in range(3):
        params_of(plain)[0].grad = grad * (step + 1)
        q.grad = LAYOUTS[grad_layout](grad * (step + 1))
        with only_kernels(2):
            plain.step()
            other.step()
        assert bits(q) == bits(params_of(plain)[0])
        names = other.state[q].keys() - {"step"}
        for name in names if step == 0 else ():
            other.state[q][name] = LAYOUTS["every_second"](other.state[q][name])
    assert len(names) >= 2
    for name in names:
        assert bits(other.state[q][name]) == bits(plain.state[params_of(plain)[0]][name])


@each_row
def test_instruction_sets_and_threads(row):
    params = [torch.randn(shape).to(dtype).requires_grad_() for dtype, shape in LARGE]
    params.append(torch.randn(900, 500).t().requires_grad_())
    steps = [[torch.randn(p.shape).to(p.dtype) for p in params] for _ in range(3)]
    results = {}
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        onepass._core.force_isa(isa)
        torch.set_num_threads(threads)
        optimizer = row.ours(copies(params), **row.full)
        with only_kernels(3 * len(params)):
            run(optimizer, steps)
        results[isa, threads] = everything(optimizer)
    expected = results[ISAS[0], 1]
    assert expected[0] != bits(params[0])
    assert [key for key, result in results.items() if result != expected] == []


@each_case
def test_resume(row, kwargs):
    """Stopping at step 4 and going on from the state_dict is to the bit the same as not stopping."""
    params = [*model(), *model(torch.bfloat16), *model(torch.float64)]
    steps = [gradients(params, step) for step in range(1, 8)]
    for state_dtype in (None, torch.float32):
        straight = row.ours(copies(params), **kwargs, state_dtype=state_dtype)
        run(straight, steps)
        first = row.ours(copies(params), **kwargs, state_dtype=state_dtype)
        run(first, steps[:4])
        second = row.ours(copies(params_of(first)))
        second.load_state_dict(through_a_file(first.state_dict()))
        assert everything(second) == everything(first)
        run(second, steps[4:])
        assert everything(second) == everything(straight)


@each_row
def test_grad_scaler(row):
    """Gradients are unscaled inside: a power of two changes no bit; found_inf leaves all as it is."""
    params = model()
    plain, scaled = row.ours(copies(params), **row.full), row.ours(copies(params), **row.full)
    for step in range(1, 4):
        grads = gradients(params, step)
        run(plain, [grads])
        give(scaled, [grad * 1024 if grad is not None else None for grad in grads])
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        scaled.step()
    assert everything(scaled) == everything(plain)
    scaled.found_inf = torch.tensor(1.0)
    scaled.step()
    assert everything(scaled) == everything(plain)


@each_row
def test_slow_weights(row):
    """Lookahead over it moves them in torch operations."""
    params = model()
    one = onepass.Lookahead(row.ours(copies(params), **row.full), k=2, alpha=0.5)
    other = onepass.Lookahead(row.theirs(copies(params), **row.full), k=2, alpha=0.5)
    for optimizer in (one, other):
        torch.manual_seed(1)
        run(optimizer, [gradients(params, step) for step in range(1, 6)])
    for p, q in zip(params_of(one), params_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(one.state[p]["slow_param"], other.state[q]["slow_param"], rtol=2e-5, atol=2e-6)
