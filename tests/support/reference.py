"""Every optimizer's formula once more, plain, in NumPy and float64, and what it takes to hold a step to it.

Nothing here is shared with the package. A formula takes one tensor from step t - 1 to t: the parameter ``p``, the
gradient ``g`` (already negated with ``maximize``), the states ``s`` (before the first step only those that do not begin
at zero) and ``t``, counted from 1. It returns the new parameter and the new states.
"""

import numpy as np
import onepass
import torch
from torch import Tensor

# -- formulas --------------------------------------------------------------------------------------------------------


def decay(weight_decay, p):
    """Of a weight decay of zero nothing, not even where a parameter is infinite."""
    return weight_decay * p if weight_decay else 0.0


def lerp(old, new, weight):
    """As torch.lerp, from the nearer end: with a weight of 0.5 or more, an infinite ``new`` gives NaN."""
    return old + weight * (new - old) if weight < 0.5 else new - (1 - weight) * (new - old)


def sgd(p, g, s, t, *, lr, momentum, dampening, weight_decay, nesterov, **_):
    """Sutskever et al. 2013, in torch's form: the learning rate stays outside of the buffer, which begins as g."""
    g = g + decay(weight_decay, p)
    if momentum == 0:
        return p - lr * g, {}
    b = momentum * s["momentum_buffer"] + (1 - dampening) * g if s else g
    return p - lr * (g + momentum * b if nesterov else b), {"momentum_buffer": b}


def adam(p, g, s, t, *, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay, **_):
    """Kingma and Ba 2015; Reddi et al. 2018 for amsgrad; Loshchilov and Hutter 2019 for the decoupled decay."""
    beta1, beta2 = betas
    if decoupled_weight_decay:
        p = p - lr * decay(weight_decay, p)
    else:
        g = g + decay(weight_decay, p)
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = new["max_exp_avg_sq"] = np.maximum(s.get("max_exp_avg_sq", 0.0), v)
    return p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), new


def lion(p, g, s, t, *, lr, betas, weight_decay, **_):
    """Chen et al. 2023, algorithm 2."""
    beta1, beta2 = betas
    m = s.get("exp_avg", 0.0)
    c = beta1 * m + (1 - beta1) * g
    return p - lr * (np.sign(c) + decay(weight_decay, p)), {"exp_avg": lerp(m, g, 1 - beta2)}


def lion_doubt(g, s, rounding, *, betas, **_):
    """Where the sign hangs on errors of a few roundings. An argument of exactly zero is certain: its sign is zero."""
    kept, added = betas[0] * s.get("exp_avg", 0.0), (1 - betas[0]) * g
    return abs(kept + added) < 16 * rounding * (abs(kept) + abs(added))


def signum(p, g, s, t, *, lr, momentum, weight_decay, **_):
    """Bernstein et al. 2018, algorithm 2, with decoupled weight decay."""
    b = lerp(s.get("momentum_buffer", 0.0), g, 1 - momentum)
    return p - lr * (np.sign(b) + decay(weight_decay, p)), {"momentum_buffer": b}


def signum_doubt(g, s, rounding, *, momentum, **_):
    """Where the sign hangs on errors of a few roundings, as Lion's."""
    kept, added = momentum * s.get("momentum_buffer", 0.0), (1 - momentum) * g
    return abs(kept + added) < 16 * rounding * (abs(kept) + abs(added))


def adabelief(p, g, s, t, *, lr, betas, eps, weight_decay, **_):
    """Zhuang et al. 2020, algorithm 2, with decoupled weight decay."""
    beta1, beta2 = betas
    old = s.get("exp_avg", 0.0)
    m = lerp(old, g, 1 - beta1)
    v = beta2 * s.get("exp_avg_var", 0.0) + (1 - beta2) * (beta1 * (g - old)) ** 2 + eps  # g - m, without cancellation
    change = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p - lr * (decay(weight_decay, p) + change), {"exp_avg": m, "exp_avg_var": v}


def laprop(p, g, s, t, *, lr, betas, eps, weight_decay, **_):
    """Ziyin et al. 2020, algorithm 1, with decoupled weight decay."""
    beta1, beta2 = betas
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    m = lerp(s.get("exp_avg", 0.0), g / (np.sqrt(v / (1 - beta2**t)) + eps), 1 - beta1)
    return p - lr * (decay(weight_decay, p) + m / (1 - beta1**t)), {"exp_avg": m, "exp_avg_sq": v}


def adopt(p, g, s, t, *, lr, betas, eps, weight_decay, clip_exponent, decoupled_weight_decay, **_):
    """Taniguchi et al. 2024, algorithm 2."""
    beta1, beta2 = betas
    if not decoupled_weight_decay:
        g = g + decay(weight_decay, p)
    if t == 1:
        return p, {"exp_avg": np.zeros_like(g), "exp_avg_sq": g**2}
    m = s.get("exp_avg", 0.0)
    v = s.get("exp_avg_sq", 0.0 * g)
    u = g / np.maximum(np.sqrt(v), eps)
    if clip_exponent is not None:
        u = np.clip(u, -((t - 1) ** clip_exponent), (t - 1) ** clip_exponent)
    m = lerp(m, u, 1 - beta1)
    v = beta2 * v + (1 - beta2) * g**2
    p = p - lr * ((decay(weight_decay, p) if decoupled_weight_decay else 0.0) + m)
    return p, {"exp_avg": m, "exp_avg_sq": v}


def ademamix(p, g, s, t, *, lr, betas, alpha, beta3_warmup, alpha_warmup, eps, weight_decay, **_):
    """Pagliardini et al. 2024, algorithm 1, with the schedules of the authors' implementation."""
    beta1, beta2, beta3 = betas
    if alpha_warmup is not None and t < alpha_warmup:
        alpha = alpha * t / alpha_warmup
    if beta3_warmup is not None and t < beta3_warmup:
        first, last = (np.log(0.5) / np.log(min(beta + 1e-8, 1 - 1e-15)) - 1 for beta in (beta1, beta3))
        beta3 = 0.5 ** (1 / (first + (last - first) * t / beta3_warmup + 1))
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    slow = lerp(s.get("exp_avg_slow", 0.0), g, 1 - beta3)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    change = (m / (1 - beta1**t) + alpha * slow) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p - lr * (decay(weight_decay, p) + change), {"exp_avg": m, "exp_avg_slow": slow, "exp_avg_sq": v}


def adan(p, g, s, t, *, lr, betas, eps, weight_decay, no_prox, **_):
    """Xie et al. 2022, algorithm 1, with betas that are decay rates."""
    beta1, beta2, beta3 = betas
    d = g + s.get("neg_pre_grad", 0.0) if t > 1 else 0.0 * g
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    v = lerp(s.get("exp_avg_diff", 0.0), d, 1 - beta2)
    n = beta3 * s.get("exp_avg_sq", 0.0) + (1 - beta3) * (g + beta2 * d) ** 2
    change = (m / (1 - beta1**t) + beta2 * v / (1 - beta2**t)) / (np.sqrt(n / (1 - beta3**t)) + eps)
    if no_prox:
        p = p - lr * (decay(weight_decay, p) + change)
    else:  # (p - lr * change) / (1 + lr * weight_decay), whose denominator would be rounded
        shrinkage = lr * weight_decay / (1 + lr * weight_decay)
        p = p - lr * change - shrinkage * (p - lr * change)
    return p, {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "neg_pre_grad": -g}


def norm(x):
    """The 2-norm, with sums in long double."""
    return np.sqrt(np.sum(np.square(x, dtype=np.longdouble))).astype(np.asarray(x).dtype)


def lamb(p, g, s, t, *, lr, betas, eps, weight_decay, trust_ratio, trust_clip, **_):
    """You et al. 2020, algorithm 2, of one whole tensor."""
    beta1, beta2 = betas
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay(weight_decay, p)
    ratio = norm(p) / norm(u) if trust_ratio and norm(p) > 0 and norm(u) > 0 else 1.0
    return p - lr * (min(ratio, 1.0) if trust_clip else ratio) * u, {"exp_avg": m, "exp_avg_sq": v}


def lars(p, g, s, t, *, lr, momentum, weight_decay, trust_coefficient, eps, nesterov, trust_ratio, **_):
    """You et al. 2017, algorithm 1, of one whole tensor, with the learning rate outside of the buffer."""
    ratio = 1.0
    if trust_ratio and norm(p) > 0 and norm(g) > 0:
        ratio = trust_coefficient * norm(p) / (norm(g) + weight_decay * norm(p) + eps)
    g = ratio * (g + decay(weight_decay, p))
    b = momentum * s.get("momentum_buffer", 0.0) + g
    return p - lr * (g + momentum * b if nesterov else b), {"momentum_buffer": b}


def mars(p, g, s, t, *, lr, betas, eps, weight_decay, gamma, clip_correction, **_):
    """Yuan et al. 2024, algorithm 2 with approximate differences, of one whole tensor."""
    beta1, beta2 = betas
    c = g + gamma * beta1 / (1 - beta1) * (g - s.get("last_grad", 0.0)) if t > 1 else g
    if clip_correction:
        c = c / np.maximum(1.0, norm(c))
    m = lerp(s.get("exp_avg", 0.0), c, 1 - beta1)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * c**2
    u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay(weight_decay, p)
    return p - lr * u, {"exp_avg": m, "exp_avg_sq": v, "last_grad": g}


def novograd(p, g, s, t, *, lr, betas, eps, weight_decay, grad_averaging, **_):
    """Ginsburg et al. 2019, algorithm 1, of one whole tensor."""
    beta1, beta2 = betas
    v, square = s.get("exp_avg_norm_sq", 0.0), norm(g) ** 2
    v = np.where(v == 0, square, beta2 * v + (1 - beta2) * square)
    u = g / (np.sqrt(v) + eps) + decay(weight_decay, p)
    m = beta1 * s.get("exp_avg", 0.0) + (1 - beta1 if grad_averaging else 1.0) * u
    return p - lr * m, {"exp_avg": m, "exp_avg_norm_sq": v}


def prodigy(
    p, g, s, t, *, lr, betas, beta3, eps, weight_decay, d, d0, decouple, use_bias_correction, safeguard_warmup, **_
):
    """Mishchenko and Defazio 2024, algorithm 4, of one whole tensor and with the estimate d as it is."""
    beta1, beta2 = betas
    beta3 = np.sqrt(beta2) if beta3 is None else beta3
    rate = d * lr * (np.sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1.0)
    if decouple:
        old, p = p, p - rate * decay(weight_decay, p)
    else:
        old, g = p, g + decay(weight_decay, p)
    r = beta3 * s.get("d_numerator", 0.0) + d / d0 * rate * np.sum(g * (s["p0"] - old))
    total = beta3 * s.get("s", 0.0) + d / d0 * (d if safeguard_warmup else rate) * g
    m = lerp(s.get("exp_avg", 0.0), d * g, 1 - beta1)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * (d * g) ** 2
    new = {"exp_avg": m, "exp_avg_sq": v, "s": total, "p0": s["p0"]}
    return p - rate * m / (np.sqrt(v) + d * eps), new | {"d_numerator": r, "d_denom": np.sum(abs(total))}


def stable_adamw(p, g, s, t, *, lr, betas, eps, weight_decay, **_):
    """Wortsman et al. 2023, algorithm 2, of one whole tensor."""
    gain1, gain2 = ((1 - beta) / (1 - beta**t) for beta in betas)
    m = lerp(s.get("exp_avg", 0.0), g, gain1)
    v = (1 - gain2) * s.get("exp_avg_sq", 0.0) + gain2 * g**2
    rms = norm(g / np.maximum(np.sqrt(v), eps)) / np.sqrt(max(np.size(g), 1))
    lr = lr / np.maximum(1.0, rms)  # NaN stays NaN
    return p - lr * (decay(weight_decay, p) + m / (np.sqrt(v) + eps)), {"exp_avg": m, "exp_avg_sq": v}


def schedule_free(p, g, s, t, lr, momentum, u, h):
    """Defazio et al. 2024: the point between the mean, which is not stored, and the next z."""
    z, momentum = s["z"], float(momentum)
    lr_max = max(s.get("lr_max", 0.0), lr)
    weight = float(t) ** h["r"] * lr_max ** h["weight_lr_power"]
    weight_sum = s.get("weight_sum", 0.0) + weight
    c = weight / weight_sum if weight_sum else 0.0
    y = lerp(p, z, c) - (1 - momentum * (1 - c)) * lr * u
    return y, {"lr_max": lr_max, "weight_sum": weight_sum, "z": z - lr * u}


def schedule_free_sgd(p, g, s, t, *, lr, momentum, weight_decay, warmup_steps, **h):
    """Schedule-Free over SGD, with a linear warm-up."""
    lr = lr * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
    return schedule_free(p, g, s, t, lr, momentum, g + decay(weight_decay, p), h)


def schedule_free_adamw(p, g, s, t, *, lr, betas, eps, weight_decay, warmup_steps, **h):
    """Algorithm 1, with the bias correction at v."""
    v = betas[1] * s.get("exp_avg_sq", 0.0) + (1 - betas[1]) * g**2
    lr = lr * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
    u = g / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay(weight_decay, p)
    y, new = schedule_free(p, g, s, t, lr, betas[0], u, h)
    return y, {**new, "exp_avg_sq": v}


def schedule_free_radam(p, g, s, t, *, lr, betas, eps, weight_decay, silent_sgd_phase, **h):
    """With Liu et al.'s rectification in place of the warm-up, from a length of 4 on."""
    beta2 = betas[1]
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length > 4:
        lr = lr * np.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        g = g / (np.sqrt(v / (1 - beta2**t)) + eps)
    elif silent_sgd_phase:
        lr = 0.0
    y, new = schedule_free(p, g, s, t, lr, betas[0], g + decay(weight_decay, p), h)
    return y, {**new, "exp_avg_sq": v}


def adagrad(p, g, s, t, *, lr, lr_decay, weight_decay, eps, decoupled_weight_decay=False, **_):
    """Duchi et al. 2011."""
    lr = lr / (1 + (t - 1) * lr_decay)
    if decoupled_weight_decay:
        p = p - lr * decay(weight_decay, p)
    else:
        g = g + decay(weight_decay, p)
    v = s["sum"] + g**2
    return p - lr * g / (np.sqrt(v) + eps), {"sum": v}


def sparse_adam(p, g, s, t, *, lr, betas, eps, **_):
    """Adam where eps is added to the root before its bias is corrected. For the elements that have a gradient."""
    beta1, beta2 = betas
    m = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    change = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (np.sqrt(v) + eps)
    return p - change, {"exp_avg": m, "exp_avg_sq": v}


def rmsprop(p, g, s, t, *, lr, alpha, eps, weight_decay, momentum, centered, **_):
    """Tieleman and Hinton 2012; Graves 2013 for the centered form, whose variance is never below zero."""
    g = g + decay(weight_decay, p)
    v = alpha * s.get("square_avg", 0.0) + (1 - alpha) * g**2
    new = {"square_avg": v}
    if centered:
        m = new["grad_avg"] = lerp(s.get("grad_avg", 0.0), g, 1 - alpha)
        v = np.maximum(v - m**2, 0.0)
    d = g / (np.sqrt(v) + eps)
    if momentum > 0:
        d = new["momentum_buffer"] = momentum * s.get("momentum_buffer", 0.0) + d
    return p - lr * d, new


def adadelta(p, g, s, t, *, lr, rho, eps, weight_decay, **_):
    """Zeiler 2012, algorithm 1, and a learning rate."""
    g = g + decay(weight_decay, p)
    u = s.get("acc_delta", 0.0)
    v = rho * s.get("square_avg", 0.0) + (1 - rho) * g**2
    d = np.sqrt(u + eps) / np.sqrt(v + eps) * g
    return p - lr * d, {"square_avg": v, "acc_delta": rho * u + (1 - rho) * d**2}


def adamax(p, g, s, t, *, lr, betas, eps, weight_decay, **_):
    """Kingma and Ba 2015, algorithm 2, with torch's eps, which keeps the infinity norm from being zero."""
    beta1, beta2 = betas
    g = g + decay(weight_decay, p)
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    u = np.maximum(beta2 * s.get("exp_inf", 0.0), abs(g) + eps)
    return p - lr / (1 - beta1**t) * m / u, {"exp_avg": m, "exp_inf": u}


def nadam(p, g, s, t, *, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, **_):
    """Dozat 2016, with the momentum schedule of its section on Nesterov-accelerated Adam."""
    beta1, beta2 = betas
    if decoupled_weight_decay:
        p = p - lr * decay(weight_decay, p)
    else:
        g = g + decay(weight_decay, p)
    mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** (k * momentum_decay)) for k in (t, t + 1))
    product = s["mu_product"] * mu
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    looking_ahead = next_mu * m / (1 - product * next_mu) + (1 - mu) * g / (1 - product)
    p = p - lr * looking_ahead / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p, {"mu_product": product, "exp_avg": m, "exp_avg_sq": v}


def radam(p, g, s, t, *, lr, betas, eps, weight_decay, decoupled_weight_decay, **_):
    """Liu et al. 2020, algorithm 2; as in torch the variance is trusted from a length of 5 on, not 4."""
    beta1, beta2 = betas
    if decoupled_weight_decay:
        p = p - lr * decay(weight_decay, p)
    else:
        g = g + decay(weight_decay, p)
    m = lerp(s.get("exp_avg", 0.0), g, 1 - beta1)
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    d = m / (1 - beta1**t)
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * beta2**t / (1 - beta2**t)
    if length > 5:
        rectified = np.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
        d = d * rectified * np.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
    return p - lr * d, {"exp_avg": m, "exp_avg_sq": v}


def asgd(p, g, s, t, *, lr, lambd, alpha, t0, weight_decay, **_):
    """Polyak and Juditsky 1992, with the rates of Bottou's SGD: they are those that the last step has left."""
    g = g + decay(weight_decay, p)
    eta, mu = s["eta"], s["mu"]
    p = p - eta * lambd * p - eta * g
    ax = s.get("ax", 0.0)
    ax = ax + mu * (p - ax) if mu != 1 else p
    return p, {"eta": lr / (1 + lambd * lr * t) ** alpha, "mu": 1 / max(1, t - t0), "ax": ax}


def rprop(p, g, s, t, *, etas, step_sizes, **_):
    """Riedmiller and Braun 1993, in the form without weight backtracking (Igel and Huesken's iRprop-)."""

    def sign(x):
        return np.nan_to_num(np.sign(x))  # as torch's: that of NaN is 0

    agree = sign(g) * sign(s.get("prev", 0.0))
    factor = np.where(agree > 0, etas[1], np.where(agree < 0, etas[0], 1.0))
    size = np.clip(s["step_size"] * factor, *step_sizes)
    g = np.where(agree < 0, 0.0, g)
    return p - sign(g) * size, {"prev": g, "step_size": size}


def adafactor_variances(g, s, t, *, beta2_decay, **_):
    """Shazeer and Stern 2018, in torch's form: of a matrix, or each matrix of a batch, one for each row and column."""

    def average(old, x):
        return old + float(t) ** beta2_decay * (x - old)

    square = g * g
    if g.ndim < 2:
        return {"variance": average(s.get("variance", 0.0), square)}
    return {
        "row_var": average(s.get("row_var", 0.0), square.mean(-1, keepdims=True)),
        "col_var": average(s.get("col_var", 0.0), square.mean(-2, keepdims=True)),
    }


def adafactor_update(p, g, s, t, *, lr, eps, d, weight_decay, **_):
    """The rest, of the new variances."""

    def rms(x):
        return np.sqrt((x * x).mean())

    eps1, eps2 = eps
    variance = s["variance"] if g.ndim < 2 else s["row_var"] * s["col_var"]
    if g.ndim > 1:
        variance = variance / np.maximum(s["row_var"].mean(-2, keepdims=True), eps1)
    u = g / np.sqrt(np.maximum(variance, eps1 * eps1))
    alpha = max(eps2, rms(p)) * min(lr, float(t) ** -0.5)
    return p - lr * decay(weight_decay, p) - alpha / max(1.0, rms(u) / d) * u


def adafactor(p, g, s, t, **h):
    new = adafactor_variances(g, s, t, **h)
    return adafactor_update(p, g, new, t, **h), new


def came(p, g, s, t, *, lr, betas, eps, clip_threshold, weight_decay, held=None, **_):
    """Luo et al. 2023, algorithm 2. ``held``: the new states as they were stored, with which the step goes on."""
    new = {}

    def average(name, x, beta):
        new[name] = beta * s.get(name, 0.0) + (1 - beta) * x
        return held[name] if held else new[name]

    def divide(x, square, name, beta):
        rows = average(f"{name}_row", square.mean(-1, keepdims=True), beta)
        columns = average(f"{name}_col", square.mean(-2, keepdims=True), beta)
        return x / np.sqrt(rows * columns / rows.mean(-2, keepdims=True))

    square = g * g + eps[0]
    if g.ndim > 1:
        u = divide(g, square, "exp_avg_sq", betas[1])
    else:
        u = g / np.sqrt(average("exp_avg_sq", square, betas[1]))
    u = u / max(1.0, np.sqrt((u * u).mean()) / clip_threshold)
    m = average("exp_avg", u, betas[0])
    if g.ndim > 1:
        residual = (u - m) * (u - m) + eps[1]
        m = divide(m, residual, "exp_avg_res", betas[2])
    return p - lr * decay(weight_decay, p) - lr * m, new


def muon(p, g, s, t, *, lr, weight_decay, momentum, nesterov, adjust_lr_fn, **_):
    """Jordan et al. 2024; Liu et al. 2025 for the other rate. Without the iterations, which tests put aside."""
    b = momentum * s.get("momentum_buffer", 0.0) + (1 - momentum) * g
    update = (1 - momentum) * g + momentum * b if nesterov else b
    rows, columns = p.shape
    rate = 0.2 * max(rows, columns) ** 0.5 if adjust_lr_fn == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5
    return p - lr * decay(weight_decay, p) - lr * rate * update, {"momentum_buffer": b}


def cautious(formula, decoupled=True):
    """A formula with two masks: of its update (Liang et al. 2024, algorithm 1) and of its decay (Chen et al. 2025).

    A step of zero in place of the parameter, without weight decay, leaves the negated update u. ``decoupled`` is for
    formulas without such an argument.
    """

    def masked(p, g, s, t, *, cautious=False, cautious_weight_decay=False, **h):
        if not cautious and not cautious_weight_decay:
            return formula(p, g, s, t, **h)
        decouples = h.get("decoupled_weight_decay", decoupled)
        if not decouples:
            g = g + decay(h["weight_decay"], p)
        left, new = formula(np.zeros_like(p), g, s, t, **{**h, "weight_decay": 0.0})
        u = change = -left
        if cautious:
            agree = np.sign(u) * np.sign(g) > 0
            change = u * agree * (np.size(u) / max(np.sum(agree), 1e-3 * np.size(u))) if np.size(u) else u
        if "clip_exponent" in h and t == 1:
            return p, new  # ADOPT's first step only sets the average
        share = h["lr"] * h["weight_decay"] if decouples else 0.0
        opposed = cautious_weight_decay & (np.sign(u) * np.sign(p) < 0)
        if not h.get("no_prox", True):
            return p - change - np.where(opposed, 0.0, decay(share / (1 + share), p - change)), new
        return p - (change + np.where(opposed, 0.0, decay(share, p))), new

    return masked


# -- numbers ---------------------------------------------------------------------------------------------------------

# Half an ulp of 1: how far, in relation to itself, a number may move when it is rounded.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def real(t: Tensor) -> Tensor:
    """The same tensor, a complex one with a last dimension of real and imaginary part."""
    t = t.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t


def numbers(t: Tensor) -> np.ndarray:
    if t.is_sparse:
        t = t.detach().double().to_dense()  # which adds up what is of one index
    return real(t).double().numpy().copy()


def stored(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What is left of x in a tensor of this dtype. As in torch, float64 becomes a 16-bit format by way of float32."""
    t = torch.from_numpy(np.asarray(x))
    return (t if dtype == torch.float64 else t.float()).to(dtype).double().numpy()


def touched(grad: Tensor) -> np.ndarray:
    """Which elements a gradient is for: of a sparse one, those that it has entries for. The others stay."""
    if not grad.is_sparse:
        return np.array(True)
    entries = torch.ones_like(grad._values(), dtype=torch.float64)
    return numbers(torch.sparse_coo_tensor(grad._indices(), entries, grad.shape, check_invariants=True)) > 0


def bits(t: Tensor) -> bytes:
    """For comparisons to the bit: also of NaN, and of 0 and -0."""
    return real(t).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def params_of(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def hyper(group: dict) -> dict:
    """The numbers of a parameter group, without tensors."""

    def plain(value):
        return tuple(map(plain, value)) if isinstance(value, tuple) else getattr(value, "item", lambda: value)()

    return {name: plain(value) for name, value in group.items() if name not in ("params", "param_names")}


def snapshot(row, optimizer) -> list[tuple]:
    """For every parameter that has a gradient: itself, hyperparameters, numbers of it, its gradient and states."""
    rows = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                held = optimizer.state.get(p, {})
                states = {name: numbers(held[name]) for name in row.held if name in held}
                t = int(held["step"]) + 1 if row.counts_steps and "step" in held else 1
                rows.append((p, hyper(group), numbers(p), numbers(p.grad), states, t))
    return rows


# -- one step --------------------------------------------------------------------------------------------------------


def checked_step(row, optimizer, roundings: float = 4) -> None:
    """Steps, with the kernels alone, and holds every element that was written to the formula.

    The formula starts from what was in memory before this step, so the tolerance is that of one step: what comes of
    moving each of its inputs by a few roundings, of the arithmetic's precision. An element stored with fewer bits must
    be what *some* number in that range rounds to.
    """
    before = snapshot(row, optimizer)
    with only_kernels(len(before)):
        optimizer.step()
    for p, h, old_p, g, old_states, t in before:
        g = -g if h["maximize"] else g
        held = {name: optimizer.state[p][name] for name in row.held if name in optimizer.state[p]}
        dtypes = {"": real(p).dtype} | {name: real(held[name]).dtype for name in held}
        first = row.first(**h) | dict.fromkeys(row.copies, old_p)
        old_states = {name: stored(x, dtypes[name]) for name, x in first.items()} | old_states
        wide = dtypes[""] == torch.float64
        # In float64 the formula here is rounded as often as what it is compared with.
        error = roundings * (2 * ROUNDING[torch.float64] if wide else ROUNDING[torch.float32])
        # Below this, arithmetic or conversions may flush to zero.
        flushed = torch.finfo(torch.float64 if wide and set(dtypes.values()) == {torch.float64} else torch.float32).tiny

        def move(x, error=error, flushed=flushed):
            return x + np.sign(x) * (error * abs(x) + flushed)

        def formula(p, g, states, t=t, h=h):
            new_p, new = row.formula(p, g, states, t, **h)
            return {"": new_p} | new

        with np.errstate(all="ignore"):
            exact = formula(old_p, g, old_states)
            moved = [formula(move(old_p), g, old_states), formula(old_p, move(g), old_states)]
            moved += [formula(old_p, g, old_states | {name: move(x)}) for name, x in old_states.items()]
            assert set(held) == set(exact) - {""}
            there = touched(p.grad)
            for name, new in exact.items():
                old = {"": old_p, **old_states}.get(name, 0.0)
                want = np.where(there, new, old)
                room = flushed + error * (abs(want) + abs(want - old)) + sum(abs(m[name] - want) for m in moved)
                if row.sums:  # of ratios, which moving all elements together leaves as they are
                    change = abs(exact[""] - old_p)
                    room = room + error * np.where(np.isfinite(change), change, 0.0)
                if h.get("centered") and name in ("", "momentum_buffer"):  # divided by the root of a difference
                    squares, square = exact["square_avg"], exact["grad_avg"] ** 2
                    lost = np.where(squares > square, squares / (squares - square), 1.0)
                    room = room + error * lost * (abs(want) if name else abs(want - old))
                room = np.where(np.isfinite(want) & there, room, 0.0)
                got = numbers(held[name] if name else p)
                low, high = stored(want - room, dtypes[name]), stored(want + room, dtypes[name])
                good = ((low <= got) & (got <= high)) | (np.isnan(got) & np.isnan(want))
                at = np.argwhere(~good)
                assert not len(at), (
                    f"{name or 'parameter'} of {tuple(p.shape)}, {dtypes[name]}, step {t}: {len(at)} of {good.size} "
                    f"wrong, the first at {at[0]}: {got[~good][0]!r} instead of {want[~good][0]!r}"
                )


class only_kernels:
    """Asserts that the kernels, and nothing else, have stepped this many tensors (None: one at least)."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def __enter__(self):
        self.before = onepass.stats()

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        after = onepass.stats()
        assert after["torch"] == self.before["torch"], "torch's code has stepped some tensors"
        stepped = sum(after["kernel"].values()) - sum(self.before["kernel"].values())
        assert stepped > 0 if self.count is None else stepped == self.count


# -- many steps ------------------------------------------------------------------------------------------------------


class Trajectory:
    """An optimizer's parameters and states, stepped by the formula with the optimizer's own gradients.

    In float64, or in long double for float64 parameters, lest its own rounding be taken for theirs.
    """

    def __init__(self, row, optimizer) -> None:
        self.row, self.optimizer = row, optimizer
        self.params = params_of(optimizer)
        wide = any(real(p).dtype == torch.float64 for p in self.params)
        self.type = np.longdouble if wide else np.float64
        self.values = {p: numbers(p).astype(self.type) for p in self.params}
        self.states: dict[Tensor, dict] = {p: {} for p in self.params}
        self.steps = dict.fromkeys(self.params, 0)
        self.doubts = {p: np.zeros_like(self.values[p], bool) for p in self.params}

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            h = hyper(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.steps[p] += 1
                g = numbers(p.grad).astype(self.type) * (-1 if h.get("maximize") else 1)
                first = self.row.first(**h) | dict.fromkeys(self.row.copies, self.values[p])
                old = self.states[p] or self._kept(first)
                there = touched(p.grad)
                if self.row.doubt:
                    self.doubts[p] |= there & self.row.doubt(g, old, ROUNDING[real(p).dtype], **h)
                value, new = self.row.formula(self.values[p], g, old, self.steps[p], **h)
                self.values[p] = np.where(there, value, self.values[p])
                self.states[p] = self._kept({name: np.where(there, x, old.get(name, 0.0)) for name, x in new.items()})

    def _kept(self, states: dict) -> dict:
        """The scalars among them have the default dtype, whatever the parameter's."""
        scalars = [name for name in self.row.scalars if name in states]
        return states | {
            name: stored(np.asarray(states[name], np.float64), torch.get_default_dtype()) for name in scalars
        }

    def names(self) -> list[str]:
        """Of what there are numbers: "" for the parameters, and the states in use."""
        return ["", *(name for name in self.row.states if any(name in held for held in self.states.values()))]

    def numbers(self, name: str) -> np.ndarray:
        """All elements of the parameters (name "") or of a state, one after the other, without those in doubt."""
        return self._select(name, [self.states[p][name] if name else self.values[p] for p in self._having(name)])

    def of(self, optimizer, name: str) -> np.ndarray:
        """The same elements as an optimizer over copies of the parameters has them."""
        twin = dict(zip(self.params, params_of(optimizer), strict=True))
        held = [twin[p] for p in self._having(name)]
        return self._select(name, [numbers(optimizer.state[p][name] if name else p) for p in held])

    def _having(self, name: str) -> list[Tensor]:
        return [p for p in self.params if not name or name in self.states[p]]

    def _select(self, name: str, arrays: list[np.ndarray]) -> np.ndarray:
        if not name:
            arrays = [x[~self.doubts[p]] for p, x in zip(self.params, arrays, strict=True)]
        return np.concatenate([x.ravel() for x in arrays] or [np.zeros(0)])
