"""What holds for a process: one OpenMP runtime, forks, the choice of the instruction set, what an import brings in."""

import importlib.metadata
import json
import platform
import subprocess
import sys

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


X86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="faiss-cpu and intel-openmp are installed on x86-64 only"
)


@pytest.mark.parametrize("first", ["onepass", "torch", "numpy", "sklearn.ensemble", pytest.param("faiss", marks=X86)])
def test_the_compiled_module_calls_torchs_runtime_whatever_was_imported_first(first):
    """scikit-learn and faiss bring runtimes of their own, for their own code."""
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


@X86
def test_a_runtime_that_is_loaded_before_everything_else_is_used_by_all(tmp_path):
    """Users preload Intel's, which MKL needs. It has the functions that gcc's code calls, so torch calls it, too."""
    code = (
        STEP_ON_TWO_THREADS
        + """
import ctypes
owner = re.search(r"[^/]+$", onepass._openmp.library_of(ctypes.CDLL(None).GOMP_parallel))[0]
torch.ones(1_000_000).exp_()
print(owner, onepass._core.openmp_threads(), len(os.listdir("/proc/self/task")) - after)
pathlib.Path(os.environ["RESULT"]).write_bytes(b"".join(p.detach().numpy().tobytes() for p in params))
"""
    )
    files = importlib.metadata.files("intel-openmp")
    (intel,) = (str(file.locate()) for file in files if file.name == "libiomp5.so")
    results = [tmp_path / "intel", tmp_path / "gcc"]
    assert run(code, RESULT=str(results[0]), LD_PRELOAD=intel) == "libiomp5.so 2 0\n"
    assert run(code, RESULT=str(results[1])) == "libgomp.so.1 2 0\n"
    assert results[0].read_bytes() == results[1].read_bytes()


@pytest.mark.parametrize("limit", ["OMP_NUM_THREADS=1", "OMP_NUM_THREADS=2", "one core", "torch.set_num_threads(1)"])
def test_a_step_has_as_many_threads_as_torch(limit):
    name, _, number = limit.partition("=")
    code = "import os, numpy\n"
    if limit == "one core":
        code += "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
    code += "import torch, onepass\n"
    if limit.startswith("torch"):
        code += limit
    code += """
p = torch.nn.Parameter(torch.from_numpy(numpy.zeros(1_000_000, dtype="float32")))  # without torch's threads
p.grad = p.detach()
tasks = lambda: len(os.listdir("/proc/self/task"))
opt = onepass.Signum([p])
before = tasks()
opt.step()
print(torch.get_num_threads(), onepass._core.openmp_threads(), 1 + tasks() - before)
"""
    environment = {name: number} if number else {}
    threads = number or "1"
    assert run(code, **environment) == f"{threads} {threads} {threads}\n"


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


WORKERS = """
import multiprocessing, sys, numpy, torch, onepass

def trained(seed):
    # One thread in workers, as torch's DataLoader has them: in a forked process with more, torch itself waits forever.
    torch.set_num_threads(1 if multiprocessing.parent_process() else 2)
    values = numpy.linspace(-1, seed, 300_000, dtype="float32")
    p = torch.nn.Parameter(torch.from_numpy(values))
    p.grad = torch.from_numpy(values[::-1].copy())
    optimizer = onepass.AdamW([p])
    for _ in range(3):
        optimizer.step()
    return p.detach().numpy().tobytes()

if __name__ == "__main__":
    here = [trained(seed) for seed in range(4)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print(pool.map_async(trained, range(4)).get(timeout=60) == here)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_step_beside_their_parent(method, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, "-W", "error", script, method], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


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
