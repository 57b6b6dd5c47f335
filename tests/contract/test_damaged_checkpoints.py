"""Checkpoints that are damaged: an error that tells where, with nothing changed, or torch's result. Never a crash.

``ONEPASS_DAMAGES=300 pytest tests/contract/test_damaged_checkpoints.py`` tries 300 of them for each optimizer.
"""

import copy
import inspect
import io
import math
import os
import random

import onepass
import pytest
import torch
from cases import ELEMENTWISE, for_rows
from contract import assert_close, leaves, params_of, snapshot, train
from onepass.optimizers.base import Native

DAMAGES = int(os.environ.get("ONEPASS_DAMAGES", "25"))  # of each optimizer

OTHERS = [
    None,
    3,
    -1.5,
    math.nan,
    math.inf,
    "text",
    [1.0, 2.0],
    {},
    True,
    10**400,
    torch.ones(2),
    torch.tensor(math.nan),
]
NUMBERS = [0, -1, 2.5, math.nan, math.inf, 1e9, -0.0]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]


def reshaped(x, choice):
    """The same numbers, or fewer, in another shape."""
    ways = [
        lambda: x.unsqueeze(0),
        lambda: x.reshape(-1),
        lambda: x.reshape(-1)[:-1],
        lambda: x.reshape(-1)[:0],
        lambda: x.mT if x.ndim > 1 else x.expand(3, *x.shape),
        lambda: torch.zeros(()),
        lambda: x.reshape(-1)[:1].expand(x.shape) if x.ndim and x.numel() else x,
        lambda: x.to_sparse() if x.is_floating_point() else x,
        lambda: x.to("meta"),
    ]
    return choice(ways)()


def damage(saved, draw):
    """Changes one thing in a state_dict."""
    choice = draw.choice
    state, groups = saved["state"], saved["param_groups"]
    group = choice(groups)
    kind = draw.randrange(12)
    if kind < 8 and state:
        number = choice(sorted(state))
        own = state[number]
        name = choice(sorted(own)) if own else "step"
        held = own.get(name)
        if kind == 0:
            own.pop(name, None)
        elif kind == 1:
            del state[number]
        elif kind == 2 and isinstance(held, torch.Tensor):
            own[name] = held.to(choice(DTYPES))
        elif kind in (3, 4) and isinstance(held, torch.Tensor):
            own[name] = reshaped(held, choice)
        elif kind == 5:
            own[name] = choice(OTHERS)
        elif kind == 6 and isinstance(held, torch.Tensor) and held.numel() and held.is_floating_point():
            held.view(-1)[draw.randrange(held.numel())] = choice(NUMBERS)
        else:
            state[number] = choice([{}, None, own | {"more": torch.ones(3)}, dict.fromkeys(own, 1.0)])
    elif kind == 8:
        del group[choice(sorted(group))]
    elif kind == 9:
        group[choice(sorted(group))] = choice(OTHERS)
    elif kind == 10:
        group["params"] = choice([group["params"][::-1], group["params"][:-1], [0, 0], [99, 98], []])
    else:
        del saved[choice(sorted(saved))]


def outcome(opt, saved):
    """Loads and steps. Returns the error, and the optimizer's parameters and states after what went well."""
    held, groups = copy.deepcopy(opt.state_dict()["state"]), repr(opt.param_groups)
    try:
        opt.load_state_dict(copy.deepcopy(saved))
    except Exception as error:
        if isinstance(opt, Native):  # nothing was loaded; torch's class has loaded a part
            assert_close(opt.state_dict()["state"], held, rtol=0, atol=0, equal_nan=True)
            assert repr(opt.param_groups) == groups
        return error, "load", None
    before = [p.detach().clone() for p in params_of(opt)]
    for step in (3, 4):
        try:
            train(opt, 1, first=step)
        except Exception as error:
            return error, "step", before
        before = [p.detach().clone() for p in params_of(opt)]
    return None, None, before


@pytest.mark.filterwarnings("ignore")
@for_rows(ELEMENTWISE)
def test_damaged_checkpoints(row):
    for seed in range(DAMAGES):
        draw = random.Random(f"{row.name} {seed}")
        opts = [cls(leaves(), **copy.deepcopy(row.full)) for cls in (row.ours, row.theirs)]
        saved = []
        for opt in opts:
            train(opt, 2)
            saved.append(copy.deepcopy(opt.state_dict()))
        where = draw.getstate()
        for each in saved:
            draw.setstate(where)
            damage(each, draw)
        error, when, before = outcome(opts[0], saved[0])
        theirs, _, _ = outcome(opts[1], saved[1])
        if theirs is not None:
            continue
        if error is None:
            if row.theirs.__module__.startswith("torch.") or takes(row.ours, opts[0].param_groups):
                compare(*opts)
            continue
        if when == "step":  # nothing was written
            assert_close([p.detach() for p in params_of(opts[0])], before, rtol=0, atol=0, equal_nan=True)
        assert "parameter" in str(error) or "group" in str(error), (seed, repr(error))


def takes(cls, groups):
    """Whether the constructor takes these values. What others give is defined for torch's classes only."""
    names = [name for name in inspect.signature(cls).parameters if name != "params"]
    try:
        for group in groups:
            cls(leaves(), **{name: group[name] for name in names if name in group})
    except (TypeError, ValueError):
        return False
    return True


def compare(ours, theirs):
    """Parameters, where torch's are numbers. States that were damaged to 16 bits stay so in ours, and are rounded."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        dtypes = {value.dtype for value in ours.state.get(p, {}).values() if isinstance(value, torch.Tensor)}
        if q.isfinite().all() and not dtypes & {torch.float16, torch.bfloat16}:
            assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RMSprop", "Rprop", "Adagrad"])
def test_torchs_class_refuses_it_after_it_has_replaced_the_states(name):
    """Of the first state it looks whether it has a tensor as `step`, and takes the others to have it then."""
    p = torch.nn.Parameter(torch.ones(3).bfloat16())
    q = torch.nn.Parameter(torch.ones(3).bfloat16())
    opt = getattr(onepass, name)([p, q], master="split", max_norm=onepass.ZClip())
    for _ in range(3):
        p.grad, q.grad = torch.ones(3).bfloat16(), torch.full((3,), 0.3).bfloat16()
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 5.0
    saved["state"][0]["step"], saved["state"][1]["step"] = 3.0, None
    with torch.no_grad():
        q.mul_(0.5)  # its low bits are not valid then
    twin = copy.deepcopy(opt)
    with pytest.raises((TypeError, KeyError)):
        opt.load_state_dict(saved)
    for each in (opt, twin):
        for x in params_of(each):
            x.grad = torch.ones(3).bfloat16()
        each.step()
    assert_close(snapshot(opt), snapshot(twin), rtol=0, atol=0)
    assert repr(opt.state_dict()["param_groups"]) == repr(twin.state_dict()["param_groups"])


def test_a_policy_whose_state_is_no_json():
    opt = onepass.AdamW(leaves(), max_norm=onepass.ZClip())
    train(opt, 1)
    saved = opt.state_dict()
    saved["param_groups"][0]["clipping_policy"] = "text"
    with pytest.raises(ValueError, match="AdamW: group 0: clipping_policy must be the state of a policy as JSON, got"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("name", ["AdamW", "LBFGS", "Prodigy"])
def test_truncated_files(name):
    """torch refuses them, so nothing is loaded."""
    opt = getattr(onepass, name)(leaves())
    if name != "LBFGS":
        train(opt, 2)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    whole = file.getvalue()
    before = snapshot(opt)
    for size in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        with pytest.raises((RuntimeError, EOFError, OSError, ValueError)):
            opt.load_state_dict(torch.load(io.BytesIO(whole[:size]), weights_only=True))
    assert_close(snapshot(opt), before, rtol=0, atol=0)
