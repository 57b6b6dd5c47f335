"""Names of torch.optim that someone has replaced by ours: everything works as before, and nothing calls itself."""

import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

# Each part is run twice, before and after the names are replaced, and must give the same.
COMMON = """
import copy, pickle, warnings
import torch.optim.lr_scheduler as s  # held before onepass is imported
import torch.optim.swa_utils as swa
import torch
TORCH = {**vars(torch.optim), **vars(s), **vars(swa)}
import onepass

def swap():
    for theirs, ours in ((torch.optim, onepass), (s, onepass.lr_scheduler), (swa, onepass.swa_utils)):
        for name in theirs.__all__:
            if hasattr(ours, name):
                setattr(theirs, name, getattr(ours, name))
    assert s.SequentialLR is onepass.lr_scheduler.SequentialLR and torch.optim.AdamW is onepass.AdamW

def model(twin=False):
    torch.manual_seed(0)
    m = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    if twin:  # two parameters in the same memory are stepped by torch's code
        m.twin = torch.nn.Parameter(m[0].weight.data)
    return m

def loss(m, t):
    x = torch.arange(15.0).reshape(5, 3) / (t + 20)
    return m[:2](x).square().sum() + (m.twin.square().sum() if hasattr(m, "twin") else 0)

def weights(m):
    return [p.tolist() for p in m.parameters()]

def train(m, opt, steps, after=lambda t: None, loss=loss):
    for t in range(steps):
        def closure():
            opt.zero_grad()
            value = loss(m, t)
            value.backward()
            if isinstance(opt, TORCH["SparseAdam"]):
                for p in m.parameters():
                    p.grad = p.grad.to_sparse(1)
            return value
        opt.step(closure)
        after(t)

def rates(opt):
    return [group["lr"] for group in opt.param_groups]
"""

PARTS = {
    "optimizers": """
import inspect

def everything():
    found = {}
    for name in torch.optim.__all__:
        cls = getattr(onepass, name, None)
        if not inspect.isclass(cls) or cls is torch.optim.Optimizer:
            continue
        known = inspect.signature(cls).parameters
        flags = [{flag: True} for flag in ("foreach", "maximize") if flag in known]
        for options, twin in [({}, False), ({}, True), *((flag, False) for flag in flags)]:
            m = model(twin)
            opt = cls(m.parameters(), **options)
            train(m, opt, 3)
            again = copy.deepcopy(m)
            other = cls(again.parameters(), **options)
            other.load_state_dict(opt.state_dict())
            train(again, other, 2)
            pair = pickle.loads(pickle.dumps((m, opt)))
            train(*pair, 2)
            train(m, opt, 2)
            assert type(pair[1]) is cls
            found[name, twin, str(options)] = [weights(m), weights(again), weights(pair[0])]
    assert len(found) > 30
    for cls in (TORCH["LBFGS"], onepass.LBFGS):
        try:
            onepass.step_in_backward(cls(model().parameters()))
            assert False, cls
        except TypeError as error:
            found[cls.__module__] = str(error)
    m = model()
    onepass.step_in_backward(TORCH["SGD"](m.parameters(), lr=0.1))
    loss(m, 0).backward()
    found["in backward"] = weights(m)
    return found
""",
    "schedulers": """
import sys
sys.path.insert(0, SUPPORT)
import schedulers

def everything():
    ours, theirs, found = onepass.lr_scheduler, schedulers.TORCH, {}
    assert isinstance(ours.StepLR(schedulers.optimizer(), 3), TORCH["LRScheduler"])
    for case, make in schedulers.ALL.items():
        for m in (ours, theirs):
            scheduler = make(m, schedulers.optimizer())
            found[case, m is ours] = schedulers.run(scheduler, 15)
            if m is theirs:
                continue
            again = make(m, schedulers.optimizer())
            again.optimizer.load_state_dict(scheduler.optimizer.state_dict())
            again.load_state_dict(scheduler.state_dict())
            copied = copy.deepcopy(scheduler)
            found[case, "resumed"] = schedulers.run(again, 9, 15)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about a copied optimizer's step
                found[case, "copied"] = schedulers.run(copied, 9, 15)
            found[case, "preview"] = scheduler.preview(9, [0.3] * 9).tolist()
    opt = schedulers.optimizer()
    pickled = pickle.loads(pickle.dumps(ours.ChainedScheduler([ours.StepLR(opt, 2), ours.CyclicLR(opt, 0.1, 0.3, 4)])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["pickled"] = schedulers.run(pickled, 9)
    for plateau in (TORCH["ReduceLROnPlateau"], ours.ReduceLROnPlateau):
        for first in (TORCH["ExponentialLR"], ours.ExponentialLR):
            opt = schedulers.optimizer()
            inner = ours.ChainedScheduler([first(opt, 0.9), plateau(opt, factor=0.5, patience=0)])
            sequence = ours.SequentialLR(opt, [first(opt, 0.8), inner, plateau(opt, factor=0.5, patience=0)], [2, 7])
            rows = []
            for t in range(12):
                opt.step()
                sequence.step(1.0)
                rows.append(rates(opt))
            found["nested", plateau.__module__, first.__module__] = rows
    opt = schedulers.optimizer()
    scheduler = onepass.ScheduleLR(opt, "linear(9)", plateau={"patience": 0, "factor": 0.5})
    rows = []
    for t in range(9):
        opt.step()
        scheduler.step(1.0)
        rows.append(rates(opt))
    found["ScheduleLR"] = rows
    return found
""",
    "weight averaging": """
def everything():
    found = {}
    for average in (None, onepass.swa_utils.get_ema_avg_fn(0.9)):
        m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in m.parameters():
                p.copy_(torch.randn(p.shape))
        opt = onepass.SGD(m.parameters(), lr=1e-4)
        averaged = onepass.swa_utils.AveragedModel(m, avg_fn=average)
        scheduler = onepass.swa_utils.SWALR(opt, 1e-3, anneal_epochs=3)
        def after(t):
            averaged.update_parameters(m)
            scheduler.step()
        train(m, opt, 5, after, lambda m, t: m(torch.arange(15.0).reshape(5, 3) / (t + 20)).square().sum())
        onepass.swa_utils.update_bn([torch.randn(8, 3, generator=torch.Generator().manual_seed(0))], averaged)
        copied = copy.deepcopy(averaged)
        means = averaged.module[1].running_mean.tolist()
        found[average is None] = [weights(averaged), weights(copied), rates(opt), means]
        assert isinstance(scheduler, TORCH["SWALR"])
    return found
""",
}


@pytest.mark.parametrize("part", PARTS)
def test_all_works_as_before_when_torchs_names_are_ours(part):
    code = f"SUPPORT = {str(SUPPORT)!r}\n{COMMON}{PARTS[part]}"
    code += "before = everything()\nswap()\nafter = everything()\n"
    code += "assert after == before, [key for key in before if before[key] != after[key]]\n"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=200)
