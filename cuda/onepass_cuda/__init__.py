"""The CUDA kernels of onepass, which loads them when it first meets a tensor on a GPU."""
