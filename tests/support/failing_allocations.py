"""Run with failing_new.cpp loaded before everything else: in a step, each allocation of ours fails once.

Prints how many failed, by scenario. A step that raises has written nothing, and the next has the bits of a step that
nothing disturbed.
"""

import copy
import ctypes
import json
import sys

import onepass
import torch
from onepass import _core
from onepass.swa_utils import AveragedModel
from reference import bits, params_of
from torch.nn import Linear, Parameter, Sequential

new = ctypes.CDLL(sys.argv[1])
new.onepass_succeed.restype = ctypes.c_long


class Failing:
    """Lets the n-th allocation within calls of Plan.step fail.

    In the calls of other functions, pybind11 would end the process: it does not expect that its own allocations fail.
    If torch's implementation steps some parameters, nothing fails in the second call, before which they were stepped.
    """

    def __init__(self):
        self.remaining = 0  # allocations until one fails; 0: none does
        self.calls = 0
        real = _core.Plan.step

        def step(plan, *args):
            self.calls += 1
            if self.calls > 1:
                return real(plan, *args)
            new.onepass_fail(self.remaining)
            try:
                return real(plan, *args)
            finally:
                self.remaining = new.onepass_succeed()

        _core.Plan.step = step


failing = Failing()

SHAPES = [(33, 70), (5,), (), (0, 3), (4, 3, 3, 3), (2, 41)]


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def many():
    return [Parameter(torch.full((3,), 0.1 * i)) for i in range(40)]


def groups(cls):
    """Of several dtypes and hyperparameters."""
    parts = [params(), params(torch.bfloat16), params(torch.float64)]
    return cls([{"params": part, "lr": 0.01 * (i + 1)} for i, part in enumerate(parts)], lr=0.1)


def with_a_tail():
    torch.manual_seed(0)
    model = Sequential(Linear(70, 33), Linear(33, 5))
    average = AveragedModel(model, decay=0.9)
    own = list(model.parameters())
    low = [p.detach().bfloat16() for p in own]
    made = onepass.AdamW(own, max_norm=0.5, skip_nonfinite=True, average=average, copy_to=low, zero_grad=True)
    made.average_and_copies = [*average.parameters(), *low]
    return made


def strided():
    return [Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(2)).t()), *params()]


def shared():
    """Two parameters in the same memory, which torch's implementation steps, and others."""
    memory = torch.linspace(-1, 1, 64)
    return [Parameter(memory[:40]), *params(), Parameter(memory[24:])]


def large():
    """So much that the step lets other threads run."""
    return [Parameter(torch.ones(3 << 20)), *params()]


SCENARIOS = {
    "AdamW": lambda: onepass.AdamW(params(), lr=0.1),
    "AdamW, strided": lambda: onepass.AdamW(strided(), lr=0.1, amsgrad=True),
    "AdamW, shared memory": lambda: onepass.AdamW(shared(), lr=0.1),
    "SGD, large": lambda: onepass.SGD(large(), lr=0.1, momentum=0.9),
    "SGD, many": lambda: onepass.SGD(many(), lr=0.1, momentum=0.9),
    "groups": lambda: groups(onepass.NAdam),
    "tail": with_a_tail,
    "8 bits": lambda: onepass.AdamW([Parameter(torch.ones(96, 70))], state_dtype=torch.float8_e4m3fn),
    "split masters": lambda: onepass.AdamW(params(torch.bfloat16), master="split"),
    "stochastic rounding": lambda: onepass.Lion(params(torch.bfloat16), stochastic_rounding=True),
    "LAMB": lambda: onepass.LAMB(params()),
    "cautious": lambda: onepass.AdamW(params(), cautious=True, max_norm=1.0),
    "NovoGrad": lambda: onepass.NovoGrad(params()),
    "Prodigy": lambda: onepass.Prodigy(params(), d0=1e-2),
    "ScheduleFreeAdamW": lambda: onepass.ScheduleFreeAdamW(params()),
    "Adafactor": lambda: onepass.Adafactor(params()),
    "Adafactor, large": lambda: onepass.Adafactor([Parameter(torch.ones(600, 700))]),
    "Adafactor, batches": lambda: onepass.Adafactor([Parameter(torch.ones(600, 700)) for _ in range(3)]),
    "CAME": lambda: onepass.CAME(params(), lr=1e-2),
    "SparseAdam": lambda: onepass.SparseAdam([Parameter(torch.ones(50, 8))]),
    "Adagrad of rows": lambda: onepass.Adagrad([Parameter(torch.ones(50, 8)), *params()]),
    "CAME, batches": lambda: onepass.CAME([Parameter(torch.ones(n, 900)) for n in (300, 1500, 400, 2)], lr=1e-2),
    "Lookahead": lambda: onepass.Lookahead(onepass.RAdam(params()), k=2),
}
OF_ROWS = {"SparseAdam", "Adagrad of rows"}


def give(optimizer, number, name):
    generator = torch.Generator().manual_seed(number)
    for i, p in enumerate(params_of(optimizer)):
        if name in OF_ROWS and i == 0:
            rows = torch.tensor([[7, 3, 3, 40]])
            values = torch.randn(4, *p.shape[1:], generator=generator)
            p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)
        else:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def numbers(optimizer):
    """Bits of parameters, of all tensors that the step writes beside, and of the states that are there."""
    held = [bits(p.detach()) for p in [*params_of(optimizer), *getattr(optimizer, "average_and_copies", [])]]
    states = {
        (i, name): bits(x) if isinstance(x, torch.Tensor) else x
        for i, p in enumerate(params_of(optimizer))
        for name, x in optimizer.state.get(p, {}).items()
    }
    return held, states


def try_all(name):
    """Returns how many allocations failed."""
    ours, twin = SCENARIOS[name](), SCENARIOS[name]()
    failed = 0
    for number in range(3):
        for optimizer in (ours, twin):
            give(optimizer, number, name)
        held, states = numbers(ours)
        grads = [copy.deepcopy(p.grad) for p in params_of(ours)]
        n = 0
        while True:
            n += 1
            failing.remaining, failing.calls = n, 0
            try:
                ours.step()
            except MemoryError:
                assert failing.remaining == 0
                failed += 1
                now, now_states = numbers(ours)
                assert now == held, f"step {number}, allocation {n}: parameters were written"
                assert now_states == states, f"step {number}, allocation {n}: states were written, or are left"
                for p, grad in zip(params_of(ours), grads, strict=True):
                    if grad.layout is torch.strided:
                        assert bits(p.grad) == bits(grad), f"step {number}, allocation {n}: gradients were written"
                continue
            assert failing.remaining > 0, f"step {number}, allocation {n}: failed without an error"
            failing.remaining = 0
            break
        twin.step()
        assert numbers(ours) == numbers(twin), f"step {number}: not the bits of an undisturbed step"
    return failed


torch.set_num_threads(1)
report = {}
for scenario in SCENARIOS:
    try:
        report[scenario] = try_all(scenario)
    except Exception as error:
        failing.remaining = 0
        report[scenario] = f"{type(error).__name__}: {error}"
print(json.dumps(report))
