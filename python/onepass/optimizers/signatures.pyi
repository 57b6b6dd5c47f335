# Of torch 2.13, written by tests/support/signatures.py: its classes, with the arguments of ours.
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

class ASGD(torch.optim.ASGD):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        lambd: float = ...,
        alpha: float = ...,
        t0: float = ...,
        weight_decay: float = ...,
        foreach: bool | None = ...,
        maximize: bool = ...,
        differentiable: bool = ...,
        capturable: bool = ...,
        *,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Adadelta(torch.optim.Adadelta):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        rho: float = ...,
        eps: float = ...,
        weight_decay: float = ...,
        foreach: bool | None = ...,
        *,
        capturable: bool = ...,
        maximize: bool = ...,
        differentiable: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Adafactor(torch.optim.Adafactor):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        beta2_decay: float = ...,
        eps: tuple[float | None, float] = ...,
        d: float = ...,
        weight_decay: float = ...,
        *,
        foreach: bool | None = ...,
        maximize: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Adagrad(torch.optim.Adagrad):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        lr_decay: float = ...,
        weight_decay: float = ...,
        initial_accumulator_value: float = ...,
        eps: float = ...,
        foreach: bool | None = ...,
        *,
        maximize: bool = ...,
        differentiable: bool = ...,
        fused: bool | None = ...,
        decoupled_weight_decay: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Adam(torch.optim.Adam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        betas: tuple[float | Tensor, float | Tensor] = ...,
        eps: float = ...,
        weight_decay: float = ...,
        amsgrad: bool = ...,
        *,
        foreach: bool | None = ...,
        maximize: bool = ...,
        capturable: bool = ...,
        differentiable: bool = ...,
        fused: bool | None = ...,
        decoupled_weight_decay: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class AdamW(torch.optim.AdamW):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        betas: tuple[float | Tensor, float | Tensor] = ...,
        eps: float = ...,
        weight_decay: float = ...,
        amsgrad: bool = ...,
        *,
        maximize: bool = ...,
        foreach: bool | None = ...,
        capturable: bool = ...,
        differentiable: bool = ...,
        fused: bool | None = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Adamax(torch.optim.Adamax):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        betas: tuple[float, float] = ...,
        eps: float = ...,
        weight_decay: float = ...,
        foreach: bool | None = ...,
        *,
        maximize: bool = ...,
        differentiable: bool = ...,
        capturable: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Muon(torch.optim.Muon):
    def __init__(
        self,
        params: ParamsT,
        lr: float = ...,
        weight_decay: float = ...,
        momentum: float = ...,
        nesterov: bool = ...,
        ns_coefficients: tuple[float, float, float] = ...,
        eps: float = ...,
        ns_steps: int = ...,
        adjust_lr_fn: str | None = ...,
        *,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class NAdam(torch.optim.NAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        betas: tuple[float, float] = ...,
        eps: float = ...,
        weight_decay: float = ...,
        momentum_decay: float = ...,
        decoupled_weight_decay: bool = ...,
        *,
        foreach: bool | None = ...,
        maximize: bool = ...,
        capturable: bool = ...,
        differentiable: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class RAdam(torch.optim.RAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        betas: tuple[float, float] = ...,
        eps: float = ...,
        weight_decay: float = ...,
        decoupled_weight_decay: bool = ...,
        *,
        foreach: bool | None = ...,
        maximize: bool = ...,
        capturable: bool = ...,
        differentiable: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class RMSprop(torch.optim.RMSprop):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        alpha: float = ...,
        eps: float = ...,
        weight_decay: float = ...,
        momentum: float = ...,
        centered: bool = ...,
        capturable: bool = ...,
        foreach: bool | None = ...,
        maximize: bool = ...,
        differentiable: bool = ...,
        *,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class Rprop(torch.optim.Rprop):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        etas: tuple[float, float] = ...,
        step_sizes: tuple[float, float] = ...,
        *,
        capturable: bool = ...,
        foreach: bool | None = ...,
        maximize: bool = ...,
        differentiable: bool = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class SGD(torch.optim.SGD):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        momentum: float = ...,
        dampening: float = ...,
        weight_decay: float | Tensor = ...,
        nesterov: bool = ...,
        *,
        maximize: bool = ...,
        foreach: bool | None = ...,
        differentiable: bool = ...,
        fused: bool | None = ...,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...

class SparseAdam(torch.optim.SparseAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = ...,
        betas: tuple[float, float] = ...,
        eps: float = ...,
        maximize: bool = ...,
        *,
        state_dtype: torch.dtype | None = ...,
    ) -> None: ...
