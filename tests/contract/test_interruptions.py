"""An exception at every line of ours that a step runs, as Ctrl-C raises one: all that kernels update is, or nothing."""

import sys
from pathlib import Path

import onepass
import pytest
import torch
from onepass.swa_utils import AveragedModel
from reference import params_of

OURS = str(Path(onepass.__file__).parent)


class Interrupted(BaseException):
    pass


class Interruption:
    """A context in which the n-th line of this package that is run raises."""

    def __init__(self, n):
        self.lines_left = n

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            self.lines_left -= 1
            if self.lines_left == 0:
                sys.settrace(None)
                raise Interrupted
        return self.trace


SHAPES = [(33, 70), (5,), (), (4, 3, 3, 3)]


def params():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def with_followers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    low = [p.detach().bfloat16() for p in model.parameters()]
    optimizer = onepass.AdamW(model.parameters(), max_norm=0.5, average=AveragedModel(model, decay=0.9), copy_to=low)
    optimizer.followers = [*optimizer._tail.average.parameters(), *low]
    return optimizer


def in_8_bits():
    p = torch.nn.Parameter(torch.linspace(-1, 1, 8192).bfloat16())
    return onepass.AdamW([p], state_dtype=torch.float8_e4m3fn, master="split")


OPTIMIZERS = {
    "SGD": lambda: onepass.SGD(params(), momentum=0.9),
    "AdamW": lambda: onepass.AdamW(params()),
    "LAMB": lambda: onepass.LAMB(params()),
    "Adafactor": lambda: onepass.Adafactor(params()),
    "CAME": lambda: onepass.CAME(params()),
    "Prodigy": lambda: onepass.Prodigy(params()),
    "ScheduleFreeAdamW": lambda: onepass.ScheduleFreeAdamW(params()),
    "Lookahead": lambda: onepass.Lookahead(onepass.AdamW(params()), k=1),
    "with followers": with_followers,
    "in 8 bits": in_8_bits,
}


def give_gradients(optimizer, t):
    for i, p in enumerate(params_of(optimizer)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(17 * t + i)).to(p.dtype)


def everything(optimizer):
    """All that a step changes, to the bit, as something that can be compared."""
    held = [[p.detach(), *sorted(optimizer.state.get(p, {}).items())] for p in params_of(optimizer)]
    held.append([[value for key, value in group.items() if key != "params"] for group in optimizer.param_groups])
    return clone([*held, *getattr(optimizer, "followers", [])])


def clone(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().view(torch.uint8 if value.dim() else value.dtype).tolist()
    return [clone(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_step_has_moved_all_or_nothing(name):
    def prepared(steps):
        optimizer = OPTIMIZERS[name]()
        for t in range(steps):
            give_gradients(optimizer, t)
            optimizer.step()
        give_gradients(optimizer, steps)
        return optimizer

    # The averages' first step is one more copy if its count was not noted.
    for steps in (1, 2) if name == "with followers" else (0, 1):
        expected = [everything(prepared(steps + more)) for more in range(3)]
        seen, n = set(), 0
        while True:
            n += 1
            optimizer, interruption = prepared(steps), Interruption(n)
            try:
                with interruption:
                    optimizer.step()
            except Interrupted:
                pass
            if interruption.lines_left > 0:
                break
            found = everything(optimizer)
            assert found in expected[:2], f"after line {n} of step {steps}"
            made = expected.index(found)
            seen.add(made)
            give_gradients(optimizer, steps + made)
            optimizer.step()
            assert everything(optimizer) == expected[made + 1], f"after line {n} of step {steps}"
        assert seen == {0, 1}


@pytest.mark.parametrize("history", [None, 5])
def test_an_interrupted_policy_has_seen_the_norm_or_not(history):
    def fed(norms):
        policy = onepass.AutoClip(30, history)
        for norm in norms:
            policy.coefficient(norm)
        return policy

    before, norm, later = [5.0, 1.0, 4.0, 2.0, 8.0, 3.0, 7.0] * 2, 6.0, [2.5, 9.0, 0.5, 4.5, 1.5, 6.5]
    expected = []
    for seen in ([], [norm]):
        policy = fed([*before, *seen])
        expected.append([policy.coefficient(each) for each in later])
    assert expected[0] != expected[1]
    found, n = [], 0
    while True:
        n += 1
        policy, interruption = fed(before), Interruption(n)
        try:
            with interruption:
                policy.coefficient(norm)
        except Interrupted:
            pass
        if interruption.lines_left > 0:
            break
        found.append([policy.coefficient(each) for each in later])
        assert found[-1] in expected, f"after line {n}"
        kept = [norm for block in policy._sorted._blocks for norm in block]
        assert kept == sorted(policy._norms[policy._begin :]), f"after line {n}"
    assert expected[0] in found
    assert expected[1] in found
