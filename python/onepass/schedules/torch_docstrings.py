"""Docstrings of the classes that ``lr_scheduler.py`` creates: torch's schedulers with ``preview`` and ``plot``."""

DOCSTRINGS = {
    "LambdaLR": """Multiply the initial rate by a function of the step: ``lr(t) = lr(0) lr_lambda(t)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        lr_lambda: The function of the step; or a list of functions, one for each parameter group.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """,
    "MultiplicativeLR": """Multiply the rate by a function of the step in each step: ``lr(t) = lr(t - 1) lr_lambda(t)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        lr_lambda: The function of the step; or a list of functions, one for each parameter group.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.MultiplicativeLR(optimizer, lambda t: 0.5)
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """,
    "StepLR": """Multiply the rate by ``gamma`` every ``step_size`` steps: ``lr(t) = lr(0) gamma ** (t // step_size)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        step_size: Number of steps between two changes.
        gamma: The factor.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        >>> scheduler.preview(5)[:, 0].tolist()
        [0.5, 0.5, 0.25, 0.25, 0.125]
    """,
    "MultiStepLR": """Multiply the rate by ``gamma`` at each milestone: ``lr(t) = lr(0) gamma ** k`` after k milestones.

    Args:
        optimizer: The optimizer whose learning rates are set.
        milestones: The steps at which the rate changes, in ascending order.
        gamma: The factor.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
        >>> scheduler.preview(4)[:, 0].tolist()
        [0.5, 0.25, 0.25, 0.125]
    """,
    "ConstantLR": """Multiply the rate by ``factor`` for ``total_iters`` steps: ``factor lr(0)``, then ``lr(0)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        factor: The factor, in [0, 1].
        total_iters: Number of steps with the factor.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
        >>> scheduler.preview(4)[:, 0].tolist()
        [0.25, 0.25, 0.5, 0.5]
    """,
    "ExponentialLR": """Multiply the rate by ``gamma`` in each step: ``lr(t) = lr(0) gamma ** t``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        gamma: The factor.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """,
    "CyclicLR": """Triangle wave between ``base_lr`` and ``max_lr``, whose height may decrease from cycle to cycle.

    With the fraction x of the way from base_lr to max_lr: ``base_lr + (max_lr - base_lr) x s``. s is 1
    (``"triangular"``), ``2 ** (1 - cycle)`` (``"triangular2"``) or ``gamma ** t`` (``"exp_range"``).

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.

    Args:
        optimizer: The optimizer whose learning rates are set.
        base_lr: Lowest rate; a list has one for each parameter group.
        max_lr: Highest rate; a list has one for each parameter group.
        step_size_up: Number of steps from ``base_lr`` to ``max_lr``.
        step_size_down: Number of steps back; None: ``step_size_up``.
        mode: ``"triangular"``, ``"triangular2"`` or ``"exp_range"``; ignored with ``scale_fn``.
        gamma: The factor per step of ``"exp_range"``.
        scale_fn: Function that returns s, instead of ``mode``.
        scale_mode: What ``scale_fn`` is called with: ``"cycle"``, the number of the cycle from 1, or ``"iterations"``,
            the step.
        cycle_momentum: Whether ``momentum``, or the first of ``betas``, moves against the rate.
        base_momentum: Lowest momentum.
        max_momentum: Highest momentum.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5, momentum=0.9)
        >>> scheduler = onepass.lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.3, step_size_up=2)
        >>> [round(lr, 3) for lr in scheduler.preview(5)[:, 0].tolist()]
        [0.1, 0.2, 0.3, 0.2, 0.1]
    """,
    "OneCycleLR": """Rise from ``max_lr / div_factor`` to ``max_lr``, then fall to ``initial_lr / final_div_factor``.

    Each phase is ``a + (b - a) (1 - cos(pi x)) / 2`` from a to b, with x from 0 to 1, or linear. ``total_steps`` is
    the number of steps, of which ``pct_start`` is the share of the rise.

    Source: Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    arXiv:1708.07120.

    Args:
        optimizer: The optimizer whose learning rates are set.
        max_lr: Highest rate; a list has one for each parameter group.
        total_steps: Number of steps. None: ``epochs * steps_per_epoch``.
        epochs: Number of epochs; ignored with ``total_steps``.
        steps_per_epoch: Steps per epoch; ignored with ``total_steps``.
        pct_start: Fraction of the steps in which the rate rises, in [0, 1].
        anneal_strategy: Form of the phases: ``"cos"`` or ``"linear"``.
        cycle_momentum: Whether ``momentum``, or the first of ``betas``, moves against the rate.
        base_momentum: Lowest momentum; a list has one for each parameter group.
        max_momentum: Highest momentum; a list has one for each parameter group.
        div_factor: ``max_lr`` divided by the initial rate.
        final_div_factor: The initial rate divided by the last one.
        three_phase: Whether the rate falls as long as it rose, to the initial rate, and from there to the last one.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5, momentum=0.9)
        >>> scheduler = onepass.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
        >>> [round(lr, 3) for lr in scheduler.preview(6)[:, 0].tolist()]
        [0.02, 0.497, 0.406, 0.231, 0.067, 0.0]
    """,
}
