"""What holds for a process: one OpenMP runtime, forks, the choice of the instruction set, what an import brings in."""

import json

import onepass
import pytest
from contract import python

STEP_ON_TWO_THREADS = """
import os, pathlib, re, signal, sys, time, torch, onepass
torch.set_num_threads(1)  # so that torch wakes no threads here
params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (300_000, 200_000, 7)]
for p in params:
    p.grad = p.detach() / 2
torch.set_num_threads(2)
opt = onepass.AdamW(params)
before = len(os.listdir("/proc/self/task"))
opt.step()
after = len(os.listdir("/proc/self/task"))
"""


def run(code, **env):
    done = python(code, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_step_runs_on_torchs_openmp_runtime_and_there_is_no_other():
    """Two would fight for the cores, each with threads that wait actively."""
    code = (
        STEP_ON_TWO_THREADS
        + """
print(after - before, onepass._core.openmp_threads())
torch.ones(1_000_000).exp_()  # torch's own parallel region: on the same threads
print(len(os.listdir("/proc/self/task")) - after)
maps = pathlib.Path("/proc/self/maps").read_text()
print(*sorted(set(re.findall(r"/\\S*lib(?:g|i|)omp[^/\\s]*", maps))), sep="\\n")
"""
    )
    woken, more, *runtimes = run(code).splitlines()
    assert woken == "1 2"
    assert more == "0"
    assert len(runtimes) == 1


@pytest.mark.parametrize("first", ["onepass", "torch", "numpy", "sklearn.ensemble"])
def test_the_compiled_module_calls_torchs_runtime_whatever_was_imported_first(first):
    """scikit-learn brings a runtime of its own, for its own code."""
    code = (
        f"import {first}"
        + STEP_ON_TWO_THREADS
        + """
import ctypes, sklearn.ensemble
address = lambda library: ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value
own = ctypes.CDLL(onepass._openmp.runtime_of_torch())
print(address(ctypes.CDLL(None)) == address(own), hasattr(own, "GOMP_parallel"), after - before)
"""
    )
    assert run(code) == "True True 1\n"


def test_a_forked_child_steps_after_its_parent_stepped_on_threads(tmp_path):
    """libgomp's threads do not survive a fork, and a child that waited for them would wait forever.

    The child must not let torch wait for them, either: nothing but NumPy copies its result.
    """
    code = (
        STEP_ON_TWO_THREADS
        + """
path = pathlib.Path(os.environ["RESULT"])
result = lambda: b"".join(p.detach().numpy().tobytes() for p in params)
child = os.fork()
if child == 0:
    opt.step()
    path.write_bytes(result())
    os._exit(17)
deadline = time.monotonic() + 60
done = 0
while not done and time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    time.sleep(0.01)
if not done:
    os.kill(child, signal.SIGKILL)
    sys.exit("the child hangs")
opt.step()  # and the parent goes on
print(os.waitstatus_to_exitcode(status), path.read_bytes() == result())
"""
    )
    assert run(code, RESULT=str(tmp_path / "result")) == "17 True\n"


# -- ONEPASS_ISA, ONEPASS_TUNING ---------------------------------------------------------------------------------------

ISAS = onepass._core.isas()
AVAILABLE = [name for name, supported in ISAS.items() if supported]


@pytest.mark.parametrize(("asked", "got"), [("", AVAILABLE[0]), (AVAILABLE[-1], AVAILABLE[-1])])
def test_the_best_instruction_set_is_taken_unless_another_is_asked_for(asked, got):
    code = "import torch, onepass; print(onepass.explain(onepass.AdamW([torch.ones(2)])).title)"
    assert run(code, ONEPASS_ISA=asked) == f"AdamW, kernels for {got}\n"


@pytest.mark.parametrize("isa", ["sse9", *(set(ISAS) - set(AVAILABLE))])
def test_an_instruction_set_that_is_not_there_is_a_clear_error(isa):
    done = python("import onepass", ONEPASS_ISA=isa)
    text = f"ValueError: ONEPASS_ISA={isa} is not available; this machine has: {', '.join(AVAILABLE)}"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == text


@pytest.mark.parametrize("tuning", onepass._core.tunings())
def test_a_tuning_is_taken_where_it_is_asked_for(tuning):
    assert run("import onepass; print(onepass._core.tuning())", ONEPASS_TUNING=tuning) == f"{tuning}\n"


def test_an_unknown_tuning_is_a_clear_error():
    done = python("import onepass", ONEPASS_TUNING="zen4")
    text = f"ValueError: ONEPASS_TUNING=zen4 is unknown; there are: {', '.join(onepass._core.tunings())}"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == text


# -- import ----------------------------------------------------------------------------------------------------------


def test_an_import_brings_in_nothing_but_onepass():
    """What is slow to import, and of use to the command line only, must wait for it."""
    code = """
import json, sys, torch
before = set(sys.modules)
import onepass
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    assert json.loads(run(code)) == ["onepass"]
