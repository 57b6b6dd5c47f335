"""The gallery's TensorBoard run: what its event file holds, beside the same run made by torch.optim."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from onepass.cli.demo import digits
from onepass.examples import tensorboard_run
from onepass.examples.common import Gallery
from onepass.schedules import parse
from torch import nn

STEPS = 20


@pytest.fixture(scope="module")
def task():
    return digits("adamw", quick=True)


@pytest.fixture(scope="module")
def scalars(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tensorboard_run.train(task, folder, STEPS)
    return tensorboard_run.read(folder)


@pytest.fixture(scope="module")
def twin(task):
    """The losses, gradients' norms and updates of torch's AdamW, at every step."""
    torch.manual_seed(0)
    model = task.build()
    schedule = parse(tensorboard_run.SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = torch.Generator().manual_seed(0)
    losses, norms, updates = [], [], []
    for step in range(STEPS):
        inputs, targets = task.draw(batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().double()
        optimizer.param_groups[0]["lr"] = tensorboard_run.LR * schedule(step)
        optimizer.step()
        moved = nn.utils.parameters_to_vector(model.parameters()).detach().double() - before
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        losses.append(loss.item())
        norms.append(gradient.norm().item())
        updates.append((moved.norm() / before.norm()).item())
    return losses, norms, updates


def test_the_rate_is_the_schedules(scalars):
    steps, rates = scalars["optimizer/lr/0"]
    assert steps.tolist() == [0, 5, 10, 15]
    wanted = tensorboard_run.LR * parse(tensorboard_run.SCHEDULE)(np.arange(0, STEPS, 5))
    assert rates.tolist() == wanted.astype(np.float32).tolist()
    np.testing.assert_allclose(rates, 4e-3 * (0.1 + 0.9 * steps / 20), rtol=1e-6)


def test_the_first_steps_are_those_of_torch(scalars, twin):
    losses, norms, updates = twin
    for tag, wanted in (("optimizer/grad_norm", norms), ("optimizer/update_to_weight/0", updates)):
        steps, values = scalars[tag]
        assert steps.tolist() == [0, 5, 10, 15]
        # Rounding grows from step to step; the first has none but the kernels' and float32's.
        assert values[0] == pytest.approx(wanted[0], rel=1e-5), tag
        assert values[1] == pytest.approx(wanted[5], rel=1e-3), tag
    steps, values = scalars["digits/loss"]
    assert steps.tolist() == list(range(STEPS))
    np.testing.assert_allclose(values[:10], losses[:10], rtol=1e-4)
    assert values[0] == np.float32(losses[0])


def test_held_out_accuracy_is_of_all_held_out_digits(scalars, task):
    steps, values = scalars["digits/held_out_accuracy"]
    assert steps.tolist() == [0, 5, 10, 15]
    count = values * len(task.held_out[1])
    np.testing.assert_allclose(count, count.round(), atol=1e-4)
    assert values[-1] > 0.5


def assert_every_card_has_a_curve(path):
    picture = imread(path)[:, :, :3]
    orange = np.abs(picture - to_rgb(tensorboard_run.CURVE)).max(2) < 0.02
    columns = np.array_split(orange[60:], 3, axis=1)  # below the bar
    assert all(card.sum() > 100 for column in columns for card in np.array_split(column, 3))


def test_a_second_run_has_a_folder_of_its_own(tmp_path, capsys):
    runs = [tmp_path / "tensorboard_run" / name for name in ("run-1", "run-2")]
    files = []
    for done in (1, 2):
        gallery = Gallery(tmp_path, quick=True)
        tensorboard_run.run(gallery)
        assert [path.name for path in gallery.written] == ["tensorboard_run.png"]
        assert_every_card_has_a_curve(tmp_path / "tensorboard_run.png")
        assert f"tensorboard --logdir {tmp_path / 'tensorboard_run'}\n" in capsys.readouterr().out
        files.append({path: path.read_bytes() for run in runs[:done] for path in run.iterdir()})
    assert sorted(runs[0].parent.iterdir()) == runs
    assert len(files[0]) == 1
    assert len(files[1]) == 2
    assert files[0].items() <= files[1].items()
    first, second = map(tensorboard_run.read, runs)
    assert first["digits/loss"][0].tolist() == second["digits/loss"][0].tolist() == list(range(20))
