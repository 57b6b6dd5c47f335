"""The gallery: each experiment shows the fact that it teaches; and the command that runs them all."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onepass.__main__ import main
from onepass.cli import gallery as gallery_command
from onepass.examples import batch_sizes, learning_rate, momentum, pitfalls, schedules, trajectories
from onepass.examples.common import Gallery

ROOT = Path(__file__).parents[2]
EXACT = 1e-12  # relative: float64


@pytest.fixture
def gallery(tmp_path):
    return Gallery(tmp_path, quick=True)


def names(gallery):
    assert all(path.stat().st_size > 1000 for path in gallery.written)
    return [path.name for path in gallery.written]


# -- learning rate ---------------------------------------------------------------------------------------------------


def test_learning_rate_1_explodes():
    descent = learning_rate.descend(1.0, 4)
    assert descent.x.tolist() == [2, -14, 98, -686, 4802]
    assert descent.gradient.tolist() == [16, -112, 784, -5488, 38416]
    assert descent.loss.tolist() == [16, 784, 38416, 1882384, 92236816]


def test_learning_rate_0125_lands_at_zero_in_one_step():
    assert learning_rate.descend(0.125, 3).x.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("lr", [*learning_rate.SHOWN, *learning_rate.FAN])
def test_learning_rates_above_a_quarter_diverge(lr):
    descent = learning_rate.descend(lr, 10)
    assert descent.diverges == (lr > 0.25)
    np.testing.assert_allclose(descent.x, 2 * (1 - 8 * lr) ** np.arange(11.0), rtol=EXACT, atol=1e-15)


def test_learning_rate_prints_every_step_of_the_explosion(gallery, capsys):
    learning_rate.run(gallery)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["0", "2", "16", "16"], ["1", "-14", "-112", "784"], ["4", "4802", "38416", "9.22368e+07"]):
        assert row in table
    assert names(gallery) == ["learning_rate_paths.png", "learning_rate_losses.png", "learning_rate_fan.png"]


# -- momentum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", momentum.BETAS)
def test_momentum_is_an_exponentially_weighted_average(beta):
    weights = momentum.weights(beta)
    np.testing.assert_allclose(weights, (1 - beta) * beta ** np.arange(momentum.AGES), rtol=EXACT)
    gradients = np.random.default_rng(0).normal(size=50)
    averages = [gradients[: t + 1][::-1] @ weights[: t + 1] for t in range(50)]
    np.testing.assert_allclose(momentum.average(beta, gradients), averages, rtol=1e-10)


@pytest.mark.parametrize("lr", momentum.RATES)
@pytest.mark.parametrize("m", momentum.MOMENTA)
def test_momentum_paths(lr, m):
    x, velocity, path = 2.0, 0.0, [2.0]
    for _ in range(momentum.STEPS):
        velocity = m * velocity + 8 * x
        x -= lr * velocity
        path.append(x)
    np.testing.assert_allclose(momentum.descend(lr, m), path, rtol=1e-10, atol=1e-15)


def test_momentum_063_overtakes_and_09_overshoots():
    slow, fast = np.abs(momentum.descend(0.01, 0.63)), np.abs(momentum.descend(0.03, 0.0))
    assert (slow[1:8] > fast[1:8]).all()
    assert (slow[8:13] < fast[8:13]).all()
    assert momentum.descend(0.01, 0.0)[12] > slow[12]
    assert momentum.descend(0.01, 0.9).min() < -1


def test_momentum_pictures(gallery, capsys):
    momentum.run(gallery)
    assert "overtakes lr 0.03 without at step 8" in capsys.readouterr().out
    assert names(gallery) == ["momentum_weights.png", "momentum_rates.png"]


# -- trajectories ----------------------------------------------------------------------------------------------------


def test_a_rate_for_each_axis():
    factors = {name: 1 - 2 * np.array(rates) for name, rates in zip(
        trajectories.BY_RATES, [(0.125, 0.125), (0.125, 0.015), (0.015, 0.125)], strict=True
    )}  # fmt: skip
    for name, make in trajectories.BY_RATES.items():
        path = trajectories.travel((15, 0.1), make, 40)
        wanted = np.array([15, 0.1]) * factors[name] ** np.arange(41.0)[:, None]
        np.testing.assert_allclose(path.at, wanted, rtol=EXACT)


@pytest.mark.parametrize(
    ("name", "m", "nesterov"), [("momentum 0.9", 0.9, 0), ("momentum 0.8", 0.8, 0), ("Nesterov, 0.9", 0.9, 1)]
)
def test_an_initial_velocity(name, m, nesterov):
    path = trajectories.travel((15, 15), trajectories.BY_MOMENTUM[name], 80, trajectories.VELOCITY)
    x, velocity = np.array([15.0, 15.0]), np.array(trajectories.VELOCITY)
    for t in range(81):
        np.testing.assert_allclose(path.at[t], x, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(path.velocity[t], velocity, rtol=1e-10, atol=1e-12)
        gradient = 2 * x
        velocity = m * velocity + gradient
        x = x - 0.05 * (gradient + m * velocity if nesterov else velocity)
    # The velocity carries the first step of x against its gradient's direction.
    assert nesterov or path.at[1, 0] < 15 < path.at[1, 1]


def test_rmsprop_goes_equally_far_along_both_axes_at_first():
    for name, lr in zip(trajectories.BY_RMSPROP, (0.3, 2.0), strict=True):
        path = trajectories.travel((15, 7.5), trajectories.BY_RMSPROP[name], 3)
        first = path.at[0] - path.at[1]
        np.testing.assert_allclose(first, 10 * lr, rtol=1e-8)  # lr / sqrt(1 - alpha), but for eps
        np.testing.assert_allclose(path.square_avg[1], 0.01 * np.array([30.0, 15.0]) ** 2, rtol=EXACT)
    assert (path.at[1] < 0).all()


def test_trajectories_pictures(gallery):
    trajectories.run(gallery)
    assert names(gallery) == [f"trajectories_{name}.png" for name in ("rates", "momentum", "rmsprop", "states")]


# -- batches ---------------------------------------------------------------------------------------------------------


def test_all_samples_at_once_is_gradient_descent():
    inputs, targets = (t.numpy() for t in batch_sizes.data())
    fit = batch_sizes.fit(batch_sizes.SAMPLES, 5)
    weights = np.zeros(2)
    for t in range(6):
        np.testing.assert_allclose(fit.at[t], weights, rtol=1e-10)
        residual = inputs @ weights - targets
        np.testing.assert_allclose(fit.loss[t], (residual**2).mean() / 2, rtol=1e-10)
        weights = weights - batch_sizes.LR * inputs.T @ residual / len(targets)


def test_fewer_samples_are_faster_at_first_and_noisier_in_the_end():
    every, some, one = (batch_sizes.fit(batch, 10) for batch in batch_sizes.SIZES.values())
    assert [len(f.loss) - 1 for f in (every, some, one)] == [10, 160, 5120]
    least = batch_sizes.best()[1]
    after_an_epoch = [f.loss[batch_sizes.SAMPLES // f.batch] - least for f in (every, some, one)]
    assert after_an_epoch[2] < after_an_epoch[1] / 5 < after_an_epoch[0] / 5
    assert batch_sizes.jitter(one) > 3 * batch_sizes.jitter(some)
    assert (np.diff(every.loss) < 0).all()
    assert (np.diff(one.loss) > 0).mean() > 0.3


def test_batch_sizes_pictures(gallery):
    batch_sizes.run(gallery)
    assert names(gallery) == ["batch_sizes_paths.png", "batch_sizes_losses.png"]


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.MAKERS)
def test_a_curve_is_what_the_scheduler_says(name, monkeypatch):
    curve = schedules.rates(schedules.MAKERS[name])
    assert curve.shape == (200, 2)
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=schedules.LR)
    if "ScheduleLR" not in type(schedules.MAKERS[name](optimizer)).__name__:
        optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=schedules.LR)
        monkeypatch.setattr(schedules, "schedulers", torch.optim.lr_scheduler)
        monkeypatch.setattr(torch.optim.lr_scheduler, "SWALR", torch.optim.swa_utils.SWALR, raising=False)
        scheduler = schedules.MAKERS[name](optimizer)
        assert type(scheduler).__module__.startswith("torch.")
        for epoch in range(200):
            assert curve[epoch].tolist() == [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            scheduler.step(*([schedules.loss(epoch)] if "Plateau" in name else []))
    else:
        from onepass.schedules import parse

        wanted = schedules.LR * parse(name)(np.arange(200))
        np.testing.assert_allclose(curve, np.stack([wanted] * 2, 1), rtol=EXACT)


def test_schedules_that_the_gallery_names():
    curves = {name: schedules.rates(make) for name, make in schedules.MAKERS.items()}
    step, multi = curves["StepLR, every 50"], curves["MultiStepLR, at 50, 125, 160"]
    assert np.flatnonzero(np.diff(step[:, 0])).tolist() == [49, 99, 149]
    assert np.flatnonzero(np.diff(multi[:, 0])).tolist() == [49, 124, 159]
    np.testing.assert_allclose(curves["ExponentialLR, 0.95"][:, 0], 0.1 * 0.95 ** np.arange(200), rtol=EXACT)
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(200) / 50))
    np.testing.assert_allclose(curves["CosineAnnealingLR, T_max 50"][:, 0], cosine, rtol=1e-9, atol=1e-12)
    assert len(np.unique(curves["ReduceLROnPlateau, patience 10"])) > 3
    by_group = curves["LambdaLR, one for each group"]
    np.testing.assert_allclose(by_group[:, 1], 0.1 * 0.95 ** np.arange(200), rtol=EXACT)
    np.testing.assert_allclose(by_group[:, 0], 0.1 * 0.1 ** (np.arange(200) // 20), rtol=EXACT)


def test_schedules_picture(gallery):
    schedules.run(gallery)
    assert names(gallery) == ["schedules.png"]


# -- pitfalls --------------------------------------------------------------------------------------------------------


def test_pitfalls():
    weight, total, right, adding = 0.0, 0.0, [], []
    for _ in range(pitfalls.STEPS):
        weight -= pitfalls.LR * 5 * (weight - 3)
        right.append(weight)
    weight = 0.0
    for _ in range(pitfalls.STEPS):
        total += 5 * (weight - 3)
        weight -= pitfalls.LR * total
        adding.append(weight)
    still = [0.0] * pitfalls.STEPS
    wanted = {
        "zero_grad, backward, step": (right, True),
        "backward, step, zero_grad": (right, True),
        "no zero_grad: gradients add up": (adding, True),
        "backward, zero_grad, step: nothing to step with": (still, True),
        "two half batches, half the loss each": (right, True),
        "model.to(float64) after the optimizer was made": (right, True),
        "the same where torch replaces parameters": (still, False),
        "parameter replaced after the optimizer was made": (still, False),
        "replaced, then add_param_group": (right, True),
    }
    assert wanted.keys() == pitfalls.CASES.keys()
    for name, case in pitfalls.CASES.items():
        found = case()
        assert (found.weights, found.held) == (pytest.approx(wanted[name][0], rel=1e-6), wanted[name][1]), name
    assert not torch.__future__.get_overwrite_module_params_on_conversion()


def test_pitfalls_are_told(gallery, capsys):
    pitfalls.run(gallery)
    out = capsys.readouterr().out
    assert out.count("  NO\n") == 4
    assert "no gradient" in out


# -- the command -----------------------------------------------------------------------------------------------------


def test_every_file_is_an_experiment():
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "common"}
    assert files == set(gallery_command.NAMES)


def test_the_command(tmp_path, capsys):
    assert main(["gallery", "learning_rate", "pitfalls", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    out = capsys.readouterr().out
    assert "== 1 of 2: learning_rate\nLearning rate: gradient descent" in out
    assert f"3 files in {tmp_path / 'new' / 'folder'}" in out
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 3


def test_what_the_command_cannot_do(tmp_path, capsys, monkeypatch):
    assert main(["gallery", "nonsense"]) == 2
    assert "there is no nonsense; there are learning_rate, " in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["gallery", "learning_rate", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onepass.examples.common", None)
    assert main(["gallery", "learning_rate"]) == 2
    assert "pip install 'onepass[gallery]'" in capsys.readouterr().err


def test_a_file_runs_on_its_own(tmp_path):
    command = [sys.executable, ROOT / "examples" / "pitfalls.py", "--out", tmp_path, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no zero_grad: gradients add up" in done.stdout


def test_the_page_shows_every_picture_and_links_every_script():
    page = (ROOT / "examples" / "README.md").read_text()
    shown = set(re.findall(r"\(pictures/([^)]+)\)", page))
    assert shown == {path.name for path in (ROOT / "examples" / "pictures").iterdir()}
    assert set(re.findall(r"\((\w+)\.py\)", page)) == set(gallery_command.NAMES)
