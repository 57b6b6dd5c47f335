"""Pickles and reprs have the public paths, which hold when a module moves."""

import copy
import pickle
import pickletools

import onepass
import pytest
import torch
from cases import ROW, each_class
from contract import assert_same, leaves, snapshot, train
from torch.nn import Parameter


def modules(pickled: bytes) -> set[str]:
    """The modules of this package that unpickling imports, or that a text in it names."""
    texts = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    return {text.split(" ")[0] for text in texts if text.startswith("onepass")}


def make(row):
    return row.ours(leaves(row.shapes), **copy.deepcopy(row.full))


@each_class
def test_a_class_has_its_public_path(row):
    assert row.ours.__module__ == "onepass"
    assert getattr(onepass, row.ours.__name__) is row.ours
    assert repr(row.ours) == f"<class 'onepass.{row.ours.__name__}'>"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@each_class
def test_a_pickled_optimizer_goes_by_the_public_path(row, protocol):
    opt = make(row)
    train(opt, 3)
    pickled = pickle.dumps(opt, protocol)
    assert modules(pickled) == {"onepass"}
    again = pickle.loads(pickled)
    assert type(again) is row.ours
    assert_same(snapshot(again), snapshot(opt))
    for each in (opt, again):
        train(each, 2, first=3)
    assert_same(snapshot(again), snapshot(opt))


def test_a_pickled_optimizer_with_an_average_goes_by_the_public_path():
    model = torch.nn.Linear(2, 2)
    average = onepass.swa_utils.AveragedModel(model, decay=0.9)
    opt = onepass.AdamW(model.parameters(), max_norm=onepass.ZClip(), average=average, zero_grad=True)
    train(opt)
    pickled = pickle.dumps(opt)
    assert modules(pickled) <= {"onepass", "onepass.swa_utils"}
    assert pickle.loads(pickled).last_step == opt.last_step


@each_class
def test_a_pickled_state_names_no_module(row):
    opt = make(row)
    train(opt, 3)
    pickled = pickle.dumps(opt.state_dict())
    assert modules(pickled) == set()
    again = row.ours([Parameter(p.detach().clone()) for group in opt.param_groups for p in group["params"]], **row.full)
    again.load_state_dict(pickle.loads(pickled))
    for each in (opt, again):
        train(each, 2, first=3)
    assert_same(snapshot(again), snapshot(opt))


def test_lookahead():
    base = make(ROW["SGD"])
    opt = onepass.Lookahead(base, k=2)
    train(base)
    pickled = pickle.dumps(opt)
    assert modules(pickled) == {"onepass"}
    assert type(pickle.loads(pickled)) is onepass.Lookahead


def test_a_pickled_scheduler_goes_by_the_public_paths():
    opt = make(ROW["SGD"])
    schedulers = onepass.lr_scheduler
    chain = schedulers.ChainedScheduler([schedulers.StepLR(opt, 2), schedulers.ReduceLROnPlateau(opt)])
    schedule = onepass.ScheduleLR(make(ROW["SGD"]), "warmup(2)", momentum="constant()", count_skipped=False)
    for scheduler in (chain, schedule):
        pickled = pickle.dumps(scheduler)
        assert modules(pickled) <= {"onepass", "onepass.lr_scheduler", "onepass.schedules"}
        again = pickle.loads(pickled)
        assert again.state_dict() == scheduler.state_dict()


def test_all_public_names_have_the_public_path():
    values = [getattr(onepass, name) for name in onepass.__all__]
    ours = [value for value in values if getattr(value, "__module__", "").split(".")[0] == "onepass"]
    assert len(ours) > 20
    assert [value for value in ours if value.__module__ != "onepass"] == []
