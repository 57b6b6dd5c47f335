"""The gallery's digits: its runs beside torch.optim's, its rates beside lr_find's, bands, and what is run at all."""

import inspect

import numpy as np
import onepass
import pytest
import torch
from onepass.cli import demo
from onepass.examples import digits
from onepass.examples.common import Gallery
from onepass.examples.digits import BATCH, ENTRIES, Entry, Plan, Run, Runs
from torch import nn

STEPS = 10


@pytest.fixture(scope="module")
def task():
    return demo.digits("adamw", quick=True)


def entry(name):
    return next(each for each in ENTRIES if each.name == name)


def train(task, name, lr, seed=3):
    return digits.train(task, entry(name), lr, seed, STEPS * BATCH, check=4)


TWINS = {
    "SGD, momentum 0.9": (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), 0.05),
    "AdamW": (lambda params: torch.optim.AdamW(params, lr=2e-3), 2e-3),
    "RAdam": (lambda params: torch.optim.RAdam(params, lr=2e-2), 2e-2),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_run_is_that_of_torch(task, name):
    make, lr = TWINS[name]
    run = train(task, name, lr)
    torch.manual_seed(3)
    model = task.build()
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(3)
    losses, looks = [], []
    for step in range(1, STEPS + 1):
        inputs, targets = task.draw(generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (4, 8, 10):
            with torch.no_grad():
                logits = model(task.held_out[0])
            held_out = nn.functional.cross_entropy(logits, task.held_out[1]).item()
            looks.append((held_out, (logits.argmax(1) == task.held_out[1]).double().mean().item()))
    assert losses[0] - losses[-1] > 0.03  # the steps did something
    np.testing.assert_allclose(run.losses, losses, rtol=2e-5)
    assert run.steps.tolist() == [4, 8, 10]
    np.testing.assert_allclose(run.loss, [np.mean(losses[a:b]) for a, b in ((0, 4), (4, 8), (8, 10))], rtol=1e-4)
    np.testing.assert_allclose(run.held_out_loss, [loss for loss, _ in looks], rtol=1e-4)
    np.testing.assert_allclose(run.accuracy, [accuracy for _, accuracy in looks], atol=1.5 / len(task.held_out[1]))


def test_muon_takes_adamw_along(task):
    run = train(task, "Muon", 5e-3)
    torch.manual_seed(3)
    model = task.build()
    matrix = model[6].weight
    others = [p for name, p in model.named_parameters() if name != "6.weight"]
    assert matrix.shape == (128, 1024)
    pair = [
        torch.optim.Muon([matrix], lr=5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=5e-3),
    ]
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(STEPS):
        inputs, targets = task.draw(generator)
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        for optimizer in pair:
            optimizer.step()
        losses.append(loss.item())
    # Muon iterates in bfloat16: rounding shows sooner.
    np.testing.assert_allclose(run.losses[:5], losses[:5], rtol=1e-3)


@pytest.mark.parametrize("name", ["SGD", "Muon"])
def test_the_rate_is_lr_finds(task, name):
    torch.manual_seed(100)
    model = task.build()
    optimizer = onepass.SGD(model.parameters(), lr=1.0) if name == "SGD" else entry(name).make(model, 1.0)
    generator = torch.Generator().manual_seed(100)
    loader = [task.draw(generator) for _ in range(20)]
    test = onepass.lr_find(
        model, optimizer, nn.CrossEntropyLoss(), loader, start=1e-4, end=10, steps=60, progress=False
    )
    rate = digits.find(task, entry(name), 60)
    assert rate == test.suggestion("minimum")
    assert rate == test.lrs[np.nanargmin(test.smoothed[4:]) + 4] / 10


def test_own_rates_are_of_those_that_lr_find_does_not_fit(task):
    own = {each.name: each.own_lr for each in ENTRIES if each.own_lr is not None}
    assert own == {"Adadelta": 1.0, "Prodigy": 1.0, "Rprop": 0.01, "LBFGS, batch 512": 1.0}
    assert all(digits.find(task, entry(name), 25) == lr for name, lr in own.items())


def test_batches_of_any_size_are_of_the_same_samples(task):
    small, large = (digits.batches(task, 0, 512, batch) for batch in (32, 256))
    assert [len(targets) for _, targets in small] == [32] * 16
    assert [len(targets) for _, targets in large] == [256] * 2
    for i in range(2):
        assert torch.equal(torch.cat([batch[i] for batch in small]), torch.cat([batch[i] for batch in large]))


def test_a_band_is_from_the_least_to_the_largest():
    values = np.random.default_rng(0).normal(size=(3, 5))
    runs = Runs(entry("Adam"), 0.1, [Run(*[v] * 5) for v in values])
    mean, least, largest = runs.band("accuracy")
    assert least.tolist() == [min(column) for column in values.T]
    assert largest.tolist() == [max(column) for column in values.T]
    np.testing.assert_allclose(mean, [sum(column) / 3 for column in values.T], rtol=1e-14)
    assert runs.last("loss") == pytest.approx((sum(values[:, -1]) / 3, max(values[:, -1]) - min(values[:, -1])))


@pytest.mark.parametrize(("name", "lr"), [("SGD", 0.1), ("Adam", 2e-3), ("RAdam", 2e-2)])
def test_lookahead_differs_from_the_fifth_step_on(task, name, lr):
    """A loss is of the weights before its step: the first that can differ is the sixth."""
    plain = train(task, name, lr).losses
    slow = digits.train(task, Entry("", digits.lookahead(entry(name).make)), lr, 3, STEPS * BATCH, 4).losses
    assert slow[:5].tolist() == plain[:5].tolist()
    assert (slow[5:] != plain[5:]).all()


def test_every_optimizer_is_run_or_said_to_be_left_out(task):
    model = task.build()
    made = [each.make(model, 0.1) for each in ENTRIES]
    run = {type(part).__name__ for each in made for part in getattr(each, "optimizers", [each])}
    classes = {
        name
        for name in onepass.__all__
        if inspect.isclass(kind := getattr(onepass, name)) and issubclass(kind, torch.optim.Optimizer)
    }
    assert run == classes - {"Optimizer", "Combined", "Lookahead", "SAM"} - digits.LEFT_OUT.keys()
    for each in ENTRIES:
        assert type(each.make(model, 0.1)).__module__ == "onepass"


def test_digits_quickly(tmp_path, capsys):
    gallery = Gallery(tmp_path, quick=True)
    digits.run(gallery)
    out = capsys.readouterr().out
    assert [path.name for path in gallery.written] == [
        f"digits_{name}.png" for name in ("optimizers", "lookahead", "batches")
    ]
    assert all(10_000 < path.stat().st_size < 300_000 for path in gallery.written)
    assert all(out.count(f"\n{each.name} ") for each in ENTRIES)
    assert "SparseAdam is left out: " in out
    assert out.count("\nAdamW ") == 1 + len(Plan.of(quick=True).batches)
