import gc
import os
import sys

import hypothesis
import imitation
import onepass
import pytest
import reference
import torch

if not torch.cuda.is_available():
    # torch.manual_seed formats the stack three times, for devices that are not there: half a millisecond.
    torch.manual_seed = torch.default_generator.manual_seed

collect_ignore = ["ecosystem"]  # needs an extra, and is run by name: pytest tests/ecosystem

# CI has the same examples every time; whoever runs the tests by hand looks for new ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--imitate-gpu",
        choices=("tensors", "numbers-too"),
        help="takes tensors for tensors on a GPU, and an imitation of the CUDA kernels on the CPU for the kernels; "
        "but for the numbers that are kept for each parameter, or these, too",
    )


def pytest_collection_finish(session):
    """Exempts the 23,000 tests themselves from garbage collection, which benchmarks call before they time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Leaves out what cannot be compared.

    On an imitated GPU, what there are no CUDA kernels for. Before torch 2.12, its Adagrad: it cannot step parameters
    that were added after it was constructed.
    """
    imitates = config.getoption("--imitate-gpu") is not None
    words = ["LBFGS", "Adafactor", "CAME", "SparseAdam", "sparse", "misaligned"] if imitates else []
    if torch.__version__ < (2, 12):
        words.append("Adagrad")

    def is_left_out(item):
        return any(word in item.name for word in words) or (imitates and item.get_closest_marker("cpu") is not None)

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def imitated(tmp_path_factory):
    """The compiled part of an imitated GPU."""
    return imitation.compiled(tmp_path_factory.mktemp("imitation"))


@pytest.fixture(autouse=True)
def imitated_gpu(request):
    """With --imitate-gpu, all that a test does is done on an imitated GPU."""
    extent = request.config.getoption("--imitate-gpu")
    if extent is None:
        yield
        return
    with imitation.gpu(request.getfixturevalue("imitated"), extent == "numbers-too"):
        yield


@pytest.fixture(autouse=True)
def machine():
    """Every test starts from one seed, and leaves threads, instruction set, tuning and default dtype as it found them.

    One that leaves a picture open fails: matplotlib keeps it for the next test to see.
    """
    torch.manual_seed(0)
    threads, isa, tuning = torch.get_num_threads(), onepass._core.isa(), onepass._core.tuning()
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    onepass._core.force_isa(isa)
    onepass._core.force_tuning(tuning)
    onepass._core.force_bytes_per_thread(0)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.fixture(scope="module")  # not of the session: other tests look for processes that nobody has ended
def processes(tmp_path_factory):
    """Processes in process groups, for tests of what is distributed."""
    from processes import Processes  # imports torch.distributed.tensor, which takes a second

    started = Processes(tmp_path_factory.mktemp("groups"))
    yield started
    started.end()


@pytest.fixture
def kernels_only():
    """Fails a test in which torch's code stepped a tensor, or none was stepped by the kernels."""
    with reference.only_kernels():
        yield


@pytest.fixture
def all_threads(machine):
    """Steps of some thousand elements are divided between all of torch's threads."""
    onepass._core.force_bytes_per_thread(1 << 12)


@pytest.fixture
def in_float64(machine):
    """All numbers, those that torch keeps for each parameter in the default dtype included."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def one_thread(machine):
    """For small tensors: torch's own code wakes all threads for some of them, which takes long on a busy machine."""
    torch.set_num_threads(1)
