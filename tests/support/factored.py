"""What the tests of Adafactor and CAME share, whose second moments are means over rows and columns, and Muon's."""

import onepass
import reference
import torch
from cases import PlainCAME, Row, give
from reference import bits, params_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ADAFACTOR = Row(
    ours=onepass.Adafactor,
    theirs=torch.optim.Adafactor,
    formula=reference.adafactor,
    states=("row_var", "col_var", "variance"),
    full={"lr": 0.05, "weight_decay": 0.1, "eps": (1e-6, 1e-3)},
    variants={
        "default": {},
        "lr": {"lr": 0.3},
        "no_lr": {"lr": 0.0, "weight_decay": 0.1},
        "beta2_decay": {"beta2_decay": -0.3},
        "no_beta2_decay": {"beta2_decay": 0.0},
        "eps": {"eps": (0.3, 0.1)},
        "small_eps": {"eps": (1e-12, 0.0)},
        "d": {"d": 3.0},
        "weight_decay": {"weight_decay": 0.3},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "tensor_lr": {"lr": torch.tensor(0.01)},
        "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
    },
)

CAME = Row(
    ours=onepass.CAME,
    theirs=PlainCAME,
    flavours=({},),
    formula=reference.came,
    states=("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg", "exp_avg_res_row", "exp_avg_res_col"),
    scalars=(),
    full={"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9, 0.95)},
    variants={
        "default": {},
        "lr": {"lr": 0.03},
        "no_lr": {"lr": 0.0, "weight_decay": 0.1},
        "betas": {"betas": (0.5, 0.75, 0.9)},
        "zero_betas": {"betas": (0.0, 0.0, 0.0), "eps": (1e-30, 1e-3)},  # the residual is then zero
        "eps": {"eps": (0.3, 0.1)},
        "small_clip_threshold": {"clip_threshold": 0.1},
        "large_clip_threshold": {"clip_threshold": 1e3},
        "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "tensor_lr": {"lr": torch.tensor(0.01)},
        "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
    },
)

# Vectors; matrices of few and of many rows and columns; batches of small and of larger ones.
SHAPES = [(), (1,), (7,), (1031,), (1, 1), (4, 3), (1, 70), (70, 1), (33, 65), (300, 3), (3, 300), (5, 1, 1)]
SHAPES += [(40, 3, 3), (2, 3, 4, 5), (3, 9, 11), (70, 20)]


def model(dtype=torch.float32):
    """No empty tensors: torch divides by their length."""
    params = [torch.randn(shape) for shape in SHAPES]
    params += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(5, 9, 2).permute(2, 0, 1)]
    params += [torch.randn(65, 33).t()]
    return [p.to(dtype).requires_grad_() for p in params]


def gradients(params, step):
    kept = [step == 1 or (7 * step + 3 * i) % 11 > 0 for i in range(len(params))]
    return [torch.randn_like(p) * (torch.rand_like(p) > 0.02) if k else None for p, k in zip(params, kept, strict=True)]


def run(optimizer, steps) -> None:
    for grads in steps:
        give(optimizer, grads)
        optimizer.step()


def everything(optimizer) -> list[bytes]:
    """Bits of all parameters and states."""
    return [bits(t) for p in params_of(optimizer) for t in (p, *optimizer.state[p].values())]


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_second": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "sliced": lambda t: torch.nn.functional.pad(t, (3, 5, 1, 2))[1:-2, 3:-5],
    "odd_offset": lambda t: torch.cat([torch.zeros(1), t.reshape(-1)])[1:].view(t.shape),
}

# 20 MiB: ten times what is worth another thread.
LARGE = [
    (torch.float32, (700, 1100)),
    (torch.float32, (400_000,)),
    (torch.bfloat16, (300, 4200)),
    (torch.float64, (30_000, 5)),
    (torch.float32, (20_000, 3, 3)),
    (torch.float16, (3, 200, 300)),
    *[(torch.float32, shape) for shape in SHAPES],
]
