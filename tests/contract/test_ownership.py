"""What a step works on stays there until it ends, whatever other threads and user code do meanwhile.

Of values that another thread changes during a step nothing is promised but that they are numbers; the process lives.
"""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import onepass
import pytest
import torch
from contract import assert_same, give_gradients, leaves, snapshot
from reference import params_of

LARGE = ((2048, 1024),)
SMALL = tuple((n,) for n in range(1, 30))


def in_a_process(code, *args):
    """Runs code in a process of its own, which a segmentation fault or a hang ends, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


DISTURBED = """
import sys, threading, torch, onepass
sys.setswitchinterval(1e-5)
torch.set_num_threads(2)
shapes, name = eval(sys.argv[1]), sys.argv[2]
params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
opt = getattr(onepass, name)(params)

def closure():
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return torch.ones(())

def replace_states():
    for p in params:
        for key, value in list(opt.state.get(p, {}).items()):
            if isinstance(value, torch.Tensor):
                opt.state[p][key] = value.clone()

def replace_data():
    for p in params:
        p.data = p.detach().clone()

def replace_gradients():
    for p in params:
        p.grad = torch.full_like(p, 0.25)

def replace_groups():
    opt.param_groups[:] = [dict(group, params=list(group["params"])) for group in opt.param_groups]

closure()
opt.step(closure) if name == "LBFGS" else opt.step()
saved = opt.state_dict()

def load():
    opt.load_state_dict(saved)

def clear_states():
    opt.state.clear()

for change in (replace_states, replace_data, replace_gradients, replace_groups, load, clear_states):
    over = threading.Event()
    changes = 0
    thread_ended = "an exception"

    def disturb():
        global changes, thread_ended
        while not over.wait(1e-3):
            change()
            changes += 1
        thread_ended = "as told"

    thread = threading.Thread(target=disturb)
    thread.start()
    calls = steps = 0
    try:
        while thread.is_alive() and (calls < int(sys.argv[3]) or changes < 3):
            calls += 1
            try:
                opt.step(closure) if name == "LBFGS" else opt.step()
                steps += 1
            except (RuntimeError, KeyError):  # states that were taken away between two parts of a step
                assert change is clear_states or name == "LBFGS"
    finally:
        over.set()
        thread.join()
    assert thread_ended == "as told", change
    assert steps > 0 or change is clear_states, change
assert all(torch.isfinite(p).all() for p in params)
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shapes", "steps"),
    [
        ("AdamW", LARGE, 5),
        ("AdamW", SMALL, 20),
        ("NAdam", SMALL, 20),  # has scalars of its own
        ("Adafactor", LARGE, 3),
        ("Muon", ((512, 1024), (7, 3)), 3),
        ("LBFGS", LARGE, 3),
        ("LBFGS", SMALL, 5),
    ],
)
def test_another_thread_replaces_what_a_step_works_on(name, shapes, steps):
    assert in_a_process(DISTURBED, shapes, name, steps) == "fine\n"


def test_user_code_that_a_step_reads_with_cannot_change_what_is_walked():
    """A hyperparameter's item() drops groups, parameters and states."""

    class Rate:
        def __init__(self, change):
            self.change = change

        def item(self):
            self.change()
            gc.collect()
            return 0.1

    def changed(change):
        opt = onepass.SGD(leaves(SMALL, torch.float32), lr=0.1, momentum=0.9)
        opt.add_param_group({"params": leaves(SMALL, torch.float32, 1)})
        give_gradients(params_of(opt), 0)
        opt.step()
        opt.param_groups[1]["lr"] = Rate(lambda: change(opt))
        return opt

    for change in (
        lambda opt: opt.param_groups[0]["params"].clear(),
        lambda opt: opt.param_groups[0].clear(),
        lambda opt: opt.param_groups.clear(),
        lambda opt: opt.state.clear(),
        lambda opt: [setattr(p, "grad", None) for p in opt.param_groups[0]["params"]],
    ):
        opt = changed(change)
        opt.step()


def test_user_code_that_steps_again_is_refused():
    opt = onepass.SGD(leaves(SMALL, torch.float32), lr=0.1)
    give_gradients(params_of(opt), 0)

    class Rate:
        def item(self):
            opt.step()
            return 0.1

    opt.param_groups[0]["lr"] = Rate()
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=r"step\(\) was called from within step\(\)"):
        opt.step()
    assert_same(snapshot(opt), before)
    opt.param_groups[0]["lr"] = 0.1
    opt.step()  # the lock is free again
    assert all((p != was).all() for p, was in zip(params_of(opt), before["params"], strict=True))


def test_a_closure_of_lbfgs_that_steps_again_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    opt = onepass.LBFGS([p])

    def closure():
        return opt.step(closure)

    with pytest.raises(RuntimeError, match=r"step\(\) was called from within step\(\)"):
        opt.step(closure)


def test_lbfgs_in_two_threads_makes_one_step_after_the_other():
    inside, most = 0, 0

    def steps(p, opt, count):
        def closure():
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            opt.zero_grad()
            loss = ((p - 1) ** 4).sum()
            loss.backward()
            inside -= 1
            return loss

        for _ in range(count):
            opt.step(closure)

    (p, opt), (q, alone) = ((p, onepass.LBFGS([p], lr=0.1, max_iter=2)) for p in leaves(((10,), (10,)), torch.float64))
    with torch.no_grad():
        q.copy_(p)
    threads = [threading.Thread(target=steps, args=(p, opt, 10)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert most == 1
    steps(q, alone, 20)
    assert_same(snapshot(opt), snapshot(alone))


# For programs that fork. A child that does not end is killed.
ENDS_WELL = """
import os, time
def ends_well(child, seconds):
    for _ in range(50 * seconds):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_another_thread_steps_can_step():
    code = """
    import os, sys, threading, time, torch, onepass, warnings
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    p = torch.nn.Parameter(torch.zeros(1 << 22))
    p.grad = torch.ones_like(p)
    opt = onepass.SGD([p], lr=1.0)
    opt.step()
    over = threading.Event()
    def steps():
        while not over.is_set():
            opt.step()
    thread = threading.Thread(target=steps)
    thread.start()
    fine = 0
    for _ in range(4):
        time.sleep(0.02)
        child = os.fork()
        if child == 0:
            before = p[:4].clone()
            opt.step()
            os._exit(0 if (p[:4] < before).all() else 1)
        fine += ends_well(child, seconds=10)
    over.set()
    thread.join()
    print(fine)
    """
    assert int(in_a_process(ENDS_WELL + textwrap.dedent(code))) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_before_a_waiting_thread_has_the_gil_can_step():
    code = """
    import os, threading, time, torch, onepass, warnings
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.zeros(1 << 24))
    p.grad = torch.ones_like(p)
    opt = onepass.SGD([p], lr=1.0)
    def step_later():
        time.sleep(0.002)
        opt.step()
    fine = 0
    for _ in range(10):
        thread = threading.Thread(target=step_later)
        thread.start()
        opt.step()  # releases the GIL; the other thread then waits for the end of this step
        child = os.fork()
        if child == 0:
            opt.step()
            os._exit(0)
        fine += ends_well(child, seconds=4)
        thread.join()
    print(fine)
    """
    assert int(in_a_process(ENDS_WELL + textwrap.dedent(code))) == 10


def test_a_gradient_that_a_first_step_measures_may_be_replaced():
    """The states do not exist yet, so there are no jobs, but the gradient is read without the GIL."""
    code = """
    import threading, time, torch, onepass
    torch.set_num_threads(1)
    fine = 0
    for _ in range(3):
        p = torch.nn.Parameter(torch.zeros(1 << 26, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        other = torch.ones_like(p)
        opt = onepass.AdamW([p], lr=1e-3, max_norm=1.0)
        begun = threading.Event()
        def replace():
            begun.wait()
            time.sleep(0.002)
            p.grad.data = other  # frees what the step measures
        thread = threading.Thread(target=replace)
        thread.start()
        begun.set()
        opt.step()
        thread.join()
        fine += opt.last_step.grad_norm == 8192.0
    print(fine)
    """
    assert int(in_a_process(code)) == 3


def test_a_group_that_refers_to_the_optimizer_is_collected():
    class Holder:
        pass

    opt = onepass.AdamW(leaves(SMALL, torch.float32))
    give_gradients(params_of(opt), 0)
    holder = Holder()
    holder.optimizer = opt
    opt.param_groups[0]["schedule"] = holder
    opt.step()
    alive = weakref.ref(opt)
    del opt, holder
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("has_policy", [False, True])
def test_what_a_step_that_measures_holds_is_collected(has_policy):
    """The step's request is kept. It must not hold the parameters, or a policy that refers to the optimizer."""

    class Policy:
        def coefficient(self, norm):
            return 0.5

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    policy = Policy()
    opt = onepass.AdamW(leaves(SMALL, torch.float32), max_norm=policy if has_policy else 1.0)
    policy.optimizer = opt
    give_gradients(params_of(opt), 0)
    opt.step()
    alive = [weakref.ref(opt), weakref.ref(params_of(opt)[0])]
    del opt, policy
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
