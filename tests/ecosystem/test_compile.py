"""Models under torch.compile, trained by onepass."""

import onepass
import pytest
import torch
from reference import only_kernels
from tiny import CLOSE, assert_kernels, assert_same_run, loader, loss_of, net, weights


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch.compiler.reset()


def train(cls, backend, options, whole_step=False):
    model = net()
    model[3].p = 0.0
    compiled = model if backend is None else torch.compile(model, backend=backend)
    optimizer = cls(compiled.parameters(), **options)
    losses = []

    def train_step(x, y):
        optimizer.zero_grad()
        loss = loss_of(compiled, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = torch.compile(train_step, backend=backend) if whole_step else train_step
    for x, y in [*loader()] * 2:
        losses.append(step(x, y).item())
    return (losses, weights(model)), optimizer


CLASSES = {"AdamW": {"lr": 0.02}, "SGD": {"lr": 0.1, "momentum": 0.9}}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model(name, backend):
    with only_kernels():
        ours, optimizer = train(getattr(onepass, name), backend, CLASSES[name])
    assert_kernels(optimizer)
    theirs, _ = train(getattr(torch.optim, name), backend, CLASSES[name])
    assert_same_run(ours, theirs)
    eager, _ = train(getattr(onepass, name), None, CLASSES[name])
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(eager[0]), **CLOSE)


@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_training_step(name):
    """The optimizer's step breaks the graph, and is run by the kernels."""
    with only_kernels():
        ours, _ = train(getattr(onepass, name), "aot_eager", CLASSES[name], whole_step=True)
    theirs, _ = train(getattr(torch.optim, name), None, CLASSES[name])
    assert_same_run(ours, theirs)
