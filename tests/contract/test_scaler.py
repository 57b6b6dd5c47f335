"""torch.amp.GradScaler: it unscales and skips as for torch's classes; with fused=True the step does so itself."""

import onepass
import pytest
import torch
from cases import ROW, ROWS, each_row, for_rows
from contract import assert_close, assert_same, give_gradients, leaves, run_both, snapshot, torch_path, train
from reference import params_of
from torch.nn import Parameter


def scaler_at(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # what brings its scale into being
    return scaler


def taking_scale(opt):
    """What fused=True makes of an optimizer, for classes without that argument, too."""
    opt._step_supports_amp_scaling = True
    return opt


def scale_gradients(params, scale):
    for p in params:
        p.grad = p.grad * scale


def unscaled(grad, scale):
    """As GradScaler.unscale_ does it."""
    inverse = torch.full((), scale).double().reciprocal().float()
    return (grad.float() * inverse).to(grad.dtype) if grad.dtype != torch.float64 else grad * inverse


# Powers of two divide without rounding; so does any scale once it is the same product of the same float32 numbers.
SCALES = [(torch.float32, 1024.0), (torch.float32, 1000.0), (torch.float64, 1024.0), (torch.bfloat16, 65536.0)]


@each_row
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_it_is_unscaling_and_then_stepping_to_the_bit(row, dtype, scale):
    scaled, plain = (row.ours(leaves(dtype=dtype), **row.full) for _ in range(2))
    taking_scale(scaled)
    scaler = scaler_at(scale)
    for t in range(3):
        give_gradients(params_of(scaled), t)
        scale_gradients(params_of(scaled), scale)
        grads = [(p.grad, p.grad.clone()) for p in params_of(scaled)]
        for p, q in zip(params_of(plain), params_of(scaled), strict=True):
            p.grad = unscaled(q.grad, scale)
        before = onepass.stats()
        assert scaler.step(scaled) is None
        scaler.update()
        assert torch_path(before) == set()
        for grad, copy in grads:
            assert_same(grad, copy)
        plain.step()
        assert_same(snapshot(scaled), snapshot(plain))


@each_row
@pytest.mark.parametrize("scale", [3.0, 1e-3, 2.0**20])
@pytest.mark.parametrize("takes_scale", [False, True])
def test_it_is_what_torch_does(row, scale, takes_scale):
    """torch's classes have the gradients unscaled first, unless they are fused."""

    def script(opt):
        scaler = scaler_at(scale)
        for t in range(4):
            give_gradients(params_of(opt), t)
            scale_gradients(params_of(opt), scale)
            if t == 2:
                params_of(opt)[1].grad[3] = float("nan")
            scaler.step(opt)
            scaler.update(scale)

    ours, stock = (cls(leaves(dtype=torch.float32), **row.full) for cls in (row.ours, row.theirs))
    script(taking_scale(ours) if takes_scale else ours)
    script(stock)
    assert_close(snapshot(ours), snapshot(stock), rtol=1e-5, atol=1e-6)


@each_row
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_infinite_gradient_skips_the_step_and_leaves_everything(request, row, bad, steps):
    opt, plain = (row.ours(leaves(), **row.full) for _ in range(2))
    taking_scale(opt)
    events = []
    opt.register_step_post_hook(lambda *_: events.append("post"))
    train(opt, steps)
    train(plain, steps)
    before, versions = snapshot(opt), [p._version for p in params_of(opt)]
    scaler = scaler_at(1024.0)
    give_gradients(params_of(opt), steps)
    params_of(opt)[2].grad[1, 1] = bad
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(snapshot(opt), before)
    if request.config.getoption("--imitate-gpu") is None:  # a GPU tells nobody that it has skipped a step
        assert [p._version for p in params_of(opt)] == versions
    assert events == ["post"] * (steps + 1)  # step was called, as torch's fused classes have it
    train(opt, 2, first=steps)
    train(plain, 2, first=steps)
    assert_same(snapshot(opt), snapshot(plain))


@each_row
def test_unscaling_and_clipping_first(row):
    """After unscale_ there is nothing left to unscale, and a step that is to be skipped is still skipped."""

    def script(opt):
        scaler = scaler_at(256.0)
        norms = []
        for t in range(4):
            give_gradients(params_of(opt), t)
            scale_gradients(params_of(opt), 256.0)
            if t == 1:
                params_of(opt)[0].grad.fill_(float("inf"))
            scaler.unscale_(opt)
            norms.append(torch.nn.utils.clip_grad_norm_(params_of(opt)[1:], 0.5).item())
            scaler.step(opt)
            scaler.update(256.0)
        return norms

    run_both(row, script)


@each_row
def test_the_attributes_alone_are_enough(row):
    """As torch's fused classes, an optimizer may be given both without a scaler, of any shape with one element."""
    scaled, plain = (row.ours(leaves(), **row.full) for _ in range(2))
    for t, shape in enumerate([(), (1,)]):
        give_gradients(params_of(plain), t)
        plain.step()
        give_gradients(params_of(scaled), t)
        scale_gradients(params_of(scaled), 8.0)
        scaled.grad_scale, scaled.found_inf = torch.full(shape, 8.0), torch.zeros(shape)
        versions = [p.grad._version for p in params_of(scaled)]
        scaled.step()
        assert versions == [p.grad._version for p in params_of(scaled)]
        assert_same(snapshot(scaled), snapshot(plain))
        scaled.found_inf = torch.ones(shape)
        scaled.step()
        assert_same(snapshot(scaled), snapshot(plain))
        scaled.grad_scale = scaled.found_inf = None
    assert set(scaled.state_dict()) == {"state", "param_groups"}


def count_steps(opt):
    """Replaces an optimizer's step as accelerate does, to see which steps were not skipped."""
    seen, inner = [], opt.step

    def step(*args, **kwargs):
        seen.append(params_of(opt)[0].grad.abs().max().item())
        return inner(*args, **kwargs)

    opt.step = step
    return seen


def scaled_steps(opt):
    scaler = scaler_at(256.0)
    for t in range(4):
        give_gradients(params_of(opt), t)
        scale_gradients(params_of(opt), 256.0)
        if t in (1, 2):
            params_of(opt)[1].grad[3] = float("inf")
        scaler.step(opt)
        scaler.update(256.0)


@each_row
@pytest.mark.parametrize("scheduled", [False, True])
def test_who_replaces_the_step_sees_those_that_are_not_skipped(row, scheduled):
    """And the gradients unscaled, as with torch's classes."""

    def script(opt):
        if scheduled:
            torch.optim.lr_scheduler.StepLR(opt, 2)
        seen = count_steps(opt)
        scaled_steps(opt)
        assert len(seen) == 2
        return seen

    run_both(row, script)


@each_row
def test_lookahead_whose_step_is_replaced(row):
    opt = onepass.Lookahead(row.ours(leaves(), **row.full))
    seen = count_steps(opt)
    scaled_steps(opt)
    assert len(seen) == 2
    assert max(seen) < 10


@for_rows(row for row in ROWS if "fused" in row.arguments)
@pytest.mark.parametrize("fused", [None, False, True])
def test_fused_leaves_the_scale_to_the_step(row, fused):
    """As with torch's classes: Lightning does not clip for those that unscale. The kernels step in any case."""

    def script(opt):
        seen = []
        opt.register_step_pre_hook(lambda *_: seen.append(params_of(opt)[0].grad.abs().max().item()))
        scaled_steps(opt)
        assert len(seen) == (4 if fused else 2)
        return seen

    run_both(row, script, fused=fused)


@each_row
def test_lookahead_says_what_its_optimizer_says(row):
    inner = row.ours(leaves(), **row.full)
    outer = onepass.Lookahead(inner)
    assert not hasattr(outer, "_step_supports_amp_scaling")
    taking_scale(inner)
    assert outer._step_supports_amp_scaling


@pytest.mark.parametrize("found", [False, True])
def test_a_sparse_gradient_beside_dense_ones(found):
    def script(opt):
        if isinstance(opt, onepass.SGD):
            taking_scale(opt)
        scaler = scaler_at(256.0)
        p, q = params_of(opt)
        values = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
        for t in range(3):
            give_gradients([p], t)
            q.grad = torch.sparse_coo_tensor([[1, 0, 1]], values * 256.0, (4, 2), check_invariants=True)
            scale_gradients([p], 256.0)
            if found and t == 1:
                q.grad._values()[2, 0] = float("inf")
            given = (p.grad, q.grad)
            scaler.step(opt)
            scaler.update(256.0)
            if isinstance(opt, onepass.SGD):
                assert p.grad is given[0]
                assert q.grad is given[1]
                assert not q.grad.is_coalesced()
                if not (found and t == 1):
                    assert_same(q.grad._values(), values * 256.0)

    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0}
    run_both(ROW["SGD"], script, shapes=[(3,), (4, 2)], path={"sparse gradient"}, **options)


@each_row
def test_gradients_that_torchs_code_steps_are_given_back(row):
    """Two parameters in the same memory: torch's code steps them, on copies that are unscaled."""

    def script(opt):
        if isinstance(opt, row.ours):
            taking_scale(opt)
        shared = torch.linspace(-1, 1, 6, dtype=torch.float64)
        opt.add_param_group({"params": [Parameter(shared[:4]), Parameter(shared[2:])]})
        scaler = scaler_at(256.0)
        for t in range(2):
            give_gradients(params_of(opt), t)
            scale_gradients(params_of(opt), 256.0)
            grads = [(p.grad, p.grad.clone()) for p in params_of(opt)]
            scaler.step(opt)
            scaler.update()
            if isinstance(opt, row.ours):
                for p, (grad, copy) in zip(params_of(opt), grads, strict=True):
                    assert p.grad is grad
                    assert_same(grad, copy)

    run_both(row, script, path={"memory shared with another parameter"})


@each_row
def test_a_disabled_scaler_is_not_there(row):
    def script(opt):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        give_gradients(params_of(opt), 0)
        result = scaler.step(opt, lambda: 3.0)
        scaler.update()
        return result

    run_both(row, script)


class Lines:
    def add_scalar(self, tag, value, step):
        pass


def around(kind, optimizer):
    wrap = {"Lookahead": onepass.Lookahead, "SAM": onepass.SAM, "Combined": lambda opt: onepass.Combined([opt])}
    return wrap[kind](optimizer) if kind else optimizer


@pytest.mark.parametrize("kind", [None, "Lookahead", "SAM", "Combined"])
@pytest.mark.parametrize("options", [{"fused": True}, {"max_norm": 1.0}, {"zero_grad": True}, {"skip_nonfinite": True}])
def test_an_optimizer_without_gradients_beside_one_that_has_some(kind, options):
    """torch gives such an optimizer the int 0 as its found_inf."""
    with_gradient, without = (Parameter(torch.ones(3)) for _ in range(2))
    optimizer = around(kind, taking_scale(onepass.AdamW([without], **options)))
    log = onepass.log_to(Lines(), optimizer, interval=1)
    scheduler = onepass.ScheduleLR(optimizer, "warmup(5)", count_skipped=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(with_gradient.sum()).backward()
    scaler.step(torch.optim.SGD([with_gradient], lr=0.5))
    if kind == "SAM":
        optimizer.first_step()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert torch.equal(without, torch.ones(3))
    assert torch.equal(with_gradient, torch.full((3,), 0.5))
    assert scheduler.last_epoch == 1
    log.remove()
