import onepass
import pytest
import reference
import torch


@pytest.fixture(autouse=True)
def machine():
    """Every test starts from the same seed, and leaves threads, instruction set and default dtype as it found them."""
    torch.manual_seed(0)
    threads, isa, dtype = torch.get_num_threads(), onepass._core.isa(), torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    onepass._core.force_isa(isa)


@pytest.fixture
def kernels_only():
    """Fails a test in which torch's code stepped a tensor, or none was stepped by the kernels."""
    with reference.only_kernels():
        yield


@pytest.fixture
def in_float64(machine):
    """All numbers, those that torch keeps for each parameter in the default dtype included."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def one_thread(machine):
    """For small tensors: torch's own code wakes all threads for some of them, which takes long on a busy machine."""
    torch.set_num_threads(1)
