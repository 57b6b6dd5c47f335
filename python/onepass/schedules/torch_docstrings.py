"""Docstrings of the classes that ``lr_scheduler.py`` creates: torch's schedulers with ``preview`` and ``plot``."""

DOCSTRINGS = {
    "LambdaLR": """Multiply the initial rate by a function of the step: ``lr(t) = lr(0) lr_lambda(t)``.

    For the arguments see :class:`torch.optim.lr_scheduler.LambdaLR`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """,
    "MultiplicativeLR": """Multiply the rate by a function of the step in each step: ``lr(t) = lr(t - 1) lr_lambda(t)``.

    For the arguments see :class:`torch.optim.lr_scheduler.MultiplicativeLR`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.MultiplicativeLR(optimizer, lambda t: 0.5)
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """,
    "StepLR": """Multiply the rate by ``gamma`` every ``step_size`` steps: ``lr(t) = lr(0) gamma ** (t // step_size)``.

    For the arguments see :class:`torch.optim.lr_scheduler.StepLR`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        >>> scheduler.preview(5)[:, 0].tolist()
        [0.5, 0.5, 0.25, 0.25, 0.125]
    """,
    "MultiStepLR": """Multiply the rate by ``gamma`` at each milestone: ``lr(t) = lr(0) gamma ** k`` after k milestones.

    For the arguments see :class:`torch.optim.lr_scheduler.MultiStepLR`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
        >>> scheduler.preview(4)[:, 0].tolist()
        [0.5, 0.25, 0.25, 0.125]
    """,
    "ConstantLR": """Multiply the rate by ``factor`` for ``total_iters`` steps: ``factor lr(0)``, then ``lr(0)``.

    For the arguments see :class:`torch.optim.lr_scheduler.ConstantLR`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
        >>> scheduler.preview(4)[:, 0].tolist()
        [0.25, 0.25, 0.5, 0.5]
    """,
    "ExponentialLR": """Multiply the rate by ``gamma`` in each step: ``lr(t) = lr(0) gamma ** t``.

    For the arguments see :class:`torch.optim.lr_scheduler.ExponentialLR`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """,
    "CyclicLR": """Triangle wave between ``base_lr`` and ``max_lr``, whose height may decrease from cycle to cycle.

    With the fraction x of the way from base_lr to max_lr: ``base_lr + (max_lr - base_lr) x s``. s is 1
    (``"triangular"``), ``2 ** (1 - cycle)`` (``"triangular2"``) or ``gamma ** t`` (``"exp_range"``).

    For the arguments see :class:`torch.optim.lr_scheduler.CyclicLR`.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5, momentum=0.9)
        >>> scheduler = onepass.lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.3, step_size_up=2)
        >>> [round(lr, 3) for lr in scheduler.preview(5)[:, 0].tolist()]
        [0.1, 0.2, 0.3, 0.2, 0.1]
    """,
    "OneCycleLR": """Rise from ``max_lr / div_factor`` to ``max_lr``, then fall to ``initial_lr / final_div_factor``.

    Each phase is ``a + (b - a) (1 - cos(pi x)) / 2`` from a to b, with x from 0 to 1, or linear. ``total_steps`` is
    the number of steps, of which ``pct_start`` is the share of the rise.

    For the arguments see :class:`torch.optim.lr_scheduler.OneCycleLR`.

    Source: Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    arXiv:1708.07120.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5, momentum=0.9)
        >>> scheduler = onepass.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
        >>> [round(lr, 3) for lr in scheduler.preview(6)[:, 0].tolist()]
        [0.02, 0.497, 0.406, 0.231, 0.067, 0.0]
    """,
}
