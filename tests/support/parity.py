"""The measure of exactness: the distance from the formula in float64, beside that of torch's implementations."""

import numpy as np
import torch
from cases import copies, give, gradients, model
from reference import ROUNDING, Trajectory, hyper, numbers, params_of


def assert_as_exact_as_torch(row, kwargs, dtype, params=None):
    """After 40 steps, our distance from the formula is no more than that of torch's best.

    So it is for the parameters and for each state; ours and torch's are then about twice torch's own error apart, at
    most. The root mean square is the sharp measure (its margin is a fraction of one rounding of the largest number);
    the largest of some 3000 errors is partly luck.
    """
    params = params or model(dtype)
    ours = row.ours(copies(params), **kwargs)
    theirs = [row.theirs(copies(params), **kwargs, **flavour) for flavour in row.flavours_for(kwargs)]
    exact = Trajectory(row, ours)
    for step in range(1, 41):
        # All of them at the first step: torch's fused SGD fails if some have a momentum buffer and some have none.
        grads = gradients(params, step)
        for optimizer in (ours, *theirs):
            give(optimizer, grads)
            optimizer.step()
        exact.step()

    for name in exact.names():
        want = exact.numbers(name)
        ulp = 2 * ROUNDING[dtype] * abs(want).max()
        off = [exact.of(optimizer, name) - want for optimizer in (ours, *theirs)]
        largest, *their_largest = (abs(x).max() for x in off)
        rms, *their_rms = (np.sqrt((x**2).mean()) for x in off)
        # In float16, where Adam's eps is zero, much of torch's code makes NaN of some parameters; NAdam's all of it.
        best, best_rms = (min((x for x in xs if x == x), default=8 * ulp) for xs in (their_largest, their_rms))
        # The largest numbers of a rule with norms are those of tensors of one element, whose roundings are the same at
        # every step: MARS divides them by their own magnitude.
        few = 4 if row.sums else 1
        assert largest <= 1.1 * best + 4 * few * ulp, name
        assert rms <= 1.1 * best_rms + 0.1 * few * ulp, name

    for p, q in zip(params_of(ours), params_of(theirs[0]), strict=True):
        assert list(ours.state[p]) == list(theirs[0].state[q])
        for name in row.scalars:
            rtol = 1e-4 if name == "d_numerator" else 1e-5  # a sum of numbers of both signs
            torch.testing.assert_close(ours.state[p][name], theirs[0].state[q][name], rtol=rtol, atol=1e-37)

    # Where a rounding may have decided on the sign of an update, the parameter is some such updates away, or none.
    doubtful = [(abs(numbers(p) - exact.values[p])[exact.doubts[p]], p) for p in params_of(ours)]
    assert all((x <= 4.01 * hyper(ours.param_groups[0])["lr"]).all() for x, _ in doubtful)
    assert sum(x.size for x, _ in doubtful) <= (10 if row.doubt else 0)
