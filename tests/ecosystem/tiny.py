"""Small models and data for the frameworks' tests, and what is asserted of every run."""

from __future__ import annotations

from collections.abc import Iterable

import onepass
import torch
from torch import Tensor, nn

# Rounding of float32, which grows over some dozen steps; a wrong formula or rate is off by far more.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))


def points(count: int = 48) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))


def loader(count: int = 48) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(points(count), batch_size=8)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), y)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same_run(ours: tuple[list[float], Iterable[Tensor]], torchs: tuple[list[float], Iterable[Tensor]]) -> None:
    """Asserts that two runs, (losses, weights), are the same within rounding, and that they have learnt."""
    assert len(ours[0]) == len(torchs[0]) > 4
    assert len(set(ours[0])) > 4
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(torchs[0]), **CLOSE)
    torch.testing.assert_close(list(ours[1]), list(torchs[1]), **CLOSE)


def assert_clipped(run: tuple[list[float], Iterable[Tensor]], unclipped: tuple[list[float], Iterable[Tensor]]) -> None:
    """Asserts that clipping has changed the losses by far more than rounding."""
    assert len(run[0]) == len(unclipped[0])
    assert max(abs(a - b) for a, b in zip(run[0], unclipped[0], strict=True)) > 50 * CLOSE["atol"]


def assert_same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    torch.testing.assert_close(list(a), list(b), rtol=0, atol=0)


def assert_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Asserts that every parameter of an optimizer goes to the kernels."""
    assert {row.path for row in onepass.explain(optimizer)} == {"kernel"}
