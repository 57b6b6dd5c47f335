"""The gallery's surfaces: paths are those of torch.optim, or of the formula, and surfaces teach what they should."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from onepass.examples import surfaces
from onepass.examples.common import Gallery
from PIL import Image

ROSENBROCK, SADDLE, BEALE = surfaces.SURFACES
QUADRATIC, STEEP = surfaces.BENT
STEPS = 60
# Where steps jump from wall to wall, each multiplies what was a difference in the last place.
TIGHT_FOR = {("RMSprop", "Beale"): 20, ("Adafactor", "Rosenbrock"): 20}
GRADIENTS = {
    "Rosenbrock": lambda x, y: (2 * (x - 1) - 400 * x * (y - x * x), 200 * (y - x * x)),
    "x² - y²": lambda x, y: (2 * x, -2 * y),
    "Beale": lambda x, y: (
        sum(2 * (c - x + x * y**k) * (y**k - 1) for k, c in enumerate((1.5, 2.25, 2.625), 1)),
        sum(2 * (c - x + x * y**k) * k * x * y ** (k - 1) for k, c in enumerate((1.5, 2.25, 2.625), 1)),
    ),
}


def path_of(surface, name, steps=STEPS):
    method = surfaces.METHODS[name]
    return surfaces.travel(surface, method, method.rates[surfaces.SURFACES.index(surface)], steps)


def path_by_torch(surface, name, steps):
    """The same path, by a plain loop around torch's own class."""
    method = surfaces.METHODS[name]
    lr = method.rates[surfaces.SURFACES.index(surface)]
    p = torch.tensor(surface.start, dtype=torch.float64).view(method.shape).requires_grad_()
    optimizer = getattr(torch.optim, method.make.__name__)([p], lr=lr, **method.options)

    def closure():
        optimizer.zero_grad()
        x, y = p.flatten()
        loss = surface.f(x, y)
        loss.backward()
        if name == "SparseAdam":
            p.grad = p.grad.to_sparse()
        return loss

    seen = [surface.start]
    for _ in range(steps):
        optimizer.step(closure)
        seen.append(p.detach().flatten().tolist())
    return np.array(seen)


def optimizers_of_torch():
    return [name for name, method in surfaces.METHODS.items() if hasattr(torch.optim, method.make.__name__)]


@pytest.mark.parametrize("surface", surfaces.SURFACES, ids=lambda surface: surface.name)
@pytest.mark.parametrize("name", optimizers_of_torch())
def test_a_path_is_that_of_torch(name, surface):
    at = path_of(surface, name).at
    assert len(at) == STEPS + 1 or (surface is SADDLE and surface.leaves(*at[-1])) or name == "LBFGS"
    wanted = path_by_torch(surface, name, len(at) - 1)
    if (name, surface) == ("LBFGS", SADDLE):  # its search goes on for ever: how far it gets is up to rounding
        at, wanted = at[:-1], wanted[:-1]
    tight = TIGHT_FOR.get((name, surface.name), STEPS + 1)
    # torch keeps NAdam's product of momenta in float32.
    rtol, atol = (1e-8, 1e-8) if name == "NAdam" else (1e-10, 1e-10)
    np.testing.assert_allclose(at[:tight], wanted[:tight], rtol=rtol, atol=atol)
    np.testing.assert_allclose(at, wanted, rtol=1e-4, atol=1e-4)


def test_only_two_have_no_class_in_torch():
    assert set(surfaces.METHODS) - set(optimizers_of_torch()) == {"Lion", "Lookahead over SGD"}


@pytest.mark.parametrize("surface", surfaces.SURFACES, ids=lambda surface: surface.name)
def test_the_paths_of_lion_and_lookahead(surface):
    gradient = GRADIENTS[surface.name]
    i = surfaces.SURFACES.index(surface)
    lion, ahead = path_of(surface, "Lion").at, path_of(surface, "Lookahead over SGD").at

    x, m = np.array(surface.start), np.zeros(2)
    for row in lion:
        np.testing.assert_allclose(row, x, rtol=1e-10, atol=1e-12)
        g = np.array(gradient(*x))
        x = x - surfaces.METHODS["Lion"].rates[i] * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g

    x, slow, velocity = np.array(surface.start), np.array(surface.start), np.zeros(2)
    for t, row in enumerate(ahead, 1):
        np.testing.assert_allclose(row, x, rtol=1e-9, atol=1e-11)
        velocity = 0.9 * velocity + np.array(gradient(*x))
        x = x - surfaces.METHODS["Lookahead over SGD"].rates[i] * velocity
        if t % 5 == 0:
            x = slow = slow + 0.5 * (x - slow)


@pytest.mark.parametrize("surface", surfaces.SURFACES, ids=lambda surface: surface.name)
def test_surfaces(surface):
    x, y = (torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True) for _ in "xy")
    at = torch.meshgrid(x, y, indexing="ij")
    found = torch.autograd.grad(surface.f(*at).sum(), at)
    for mine, wanted in zip(found, GRADIENTS[surface.name](*(t.detach() for t in at)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    if surface.minimum:
        assert surface.f(*surface.minimum) == 0


def test_one_newton_step_is_enough_for_a_quadratic():
    rate = surfaces.CURVATURE["gradient descent"].rates[0]
    newton = surfaces.travel(QUADRATIC, surfaces.CURVATURE["Newton step"], 1.0, 1)
    descent = surfaces.travel(QUADRATIC, surfaces.CURVATURE["gradient descent"], rate, 200)
    np.testing.assert_allclose(newton.at[1], (0, 0), rtol=0, atol=1e-12)

    # Along an axis of the Hessian, a step of gradient descent multiplies by 1 - rate * eigenvalue.
    c, s = np.cos(surfaces.TURN), np.sin(surfaces.TURN)
    axes = np.array([[c, s], [-s, c]])
    factors = 1 - rate * np.array([1, surfaces.CONDITION])
    wanted = (axes @ QUADRATIC.start) * factors ** np.arange(201.0)[:, None]
    np.testing.assert_allclose(descent.at @ axes.T, wanted, rtol=1e-9, atol=1e-13)
    assert descent.steps_to(1e-4) > 100
    assert (np.diff(np.sign(wanted[:, 1])) != 0).all()  # it jumps from wall to wall
    too_fast = surfaces.travel(QUADRATIC, surfaces.CURVATURE["gradient descent"], 2.02 / surfaces.CONDITION, 400)
    assert too_fast.loss[-1] > too_fast.loss[0]


def test_newton_on_rosenbrock():
    newton = surfaces.travel(STEEP, surfaces.CURVATURE["Newton step"], 1.0, 6)
    x = np.array(STEEP.start)
    for row in newton.at:
        np.testing.assert_allclose(row, x, rtol=1e-9)
        hessian = [[2 - 400 * (x[1] - 3 * x[0] ** 2), -400 * x[0]], [-400 * x[0], 200]]
        x = x - np.linalg.solve(hessian, GRADIENTS["Rosenbrock"](*x))
    assert newton.loss[2] > 50 * newton.loss[0]  # it knows no descent
    assert newton.loss[6] < 1e-15


def test_lbfgs_needs_far_fewer_gradients_than_gradient_descent():
    lbfgs = surfaces.travel(STEEP, surfaces.CURVATURE["LBFGS"], 1.0, 60)
    descent = surfaces.travel(STEEP, surfaces.CURVATURE["gradient descent"], 1e-3, 3000)
    np.testing.assert_allclose(lbfgs.at[-1], (1, 1), atol=1e-6)
    assert lbfgs.evaluations < 150
    assert descent.evaluations == 3000
    assert descent.loss.min() > 1e-3


def test_the_saddle_holds_what_begins_on_its_axis():
    method = surfaces.Method(surfaces.onepass.SGD, (0.05, 0.05, 0.05))
    on, off = (surfaces.travel(replace(SADDLE, start=(1.0, y)), method, 0.05, SADDLE.steps) for y in (0.0, 1e-3))
    assert len(on.at) == SADDLE.steps + 1
    assert (on.at[:, 1] == 0).all()
    np.testing.assert_allclose(on.at[:, 0], 0.9 ** np.arange(SADDLE.steps + 1.0), rtol=1e-10)
    assert SADDLE.leaves(*off.at[-1])
    np.testing.assert_allclose(off.at[:, 1], 1e-3 * 1.1 ** np.arange(float(len(off.at))), rtol=1e-10)


@pytest.mark.parametrize("name", ["SGD, momentum 0.9", "SGD, Nesterov 0.9"])
def test_momentum_gets_farther_along_the_valley(name):
    assert surfaces.METHODS[name].rates[0] == surfaces.METHODS["SGD"].rates[0]
    plain, fast = path_of(ROSENBROCK, "SGD", 400), path_of(ROSENBROCK, name, 400)
    assert plain.at[-1, 0] < 0 < 0.9 < fast.at[-1, 0] < 1
    assert fast.loss[-1] < plain.loss[-1] / 100


def test_beale_has_several_ends():
    ends = {name: path_of(BEALE, name, BEALE.steps).at[-1] for name in ("Adam", "NAdam", "Rprop")}
    np.testing.assert_allclose(ends["Adam"], (3, 0.5), atol=1e-3)
    assert ends["NAdam"][0] < -1  # in the other valley
    np.testing.assert_allclose(ends["Rprop"], (0, 1), atol=1e-3)  # at the saddle between them, where nothing pulls
    np.testing.assert_allclose(GRADIENTS["Beale"](0.0, 1.0), (0, 0))


def test_sparse_adam_is_adam_but_for_where_eps_stands():
    np.testing.assert_allclose(path_of(BEALE, "SparseAdam").at, path_of(BEALE, "Adam").at, rtol=1e-5)
    assert (path_of(BEALE, "SparseAdam").at[1] != path_of(BEALE, "Adam").at[1]).all()


def test_surfaces_pictures(tmp_path, capsys):
    gallery = Gallery(tmp_path, quick=True)
    surfaces.run(gallery)
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name} ") == 3 for name in surfaces.METHODS if name != "LBFGS")
    assert [path.name for path in gallery.written] == ["surfaces.png", "surfaces.gif", "surfaces_curvature.png"]
    for path in gallery.written:
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
            assert getattr(image, "n_frames", 1) == (3 if path.suffix == ".gif" else 1)
    assert gallery.written[0].stat().st_size < 200_000
