"""Copy kernels; knows pointers, strides and streams, and nothing of hashes.

The CUDA C++ sources (`paged_copy.cu`, `*.cuh`) are compiled at run time (`forebay.kernels.nvrtc`) and started by
`forebay.kernels.cuda`; `forebay.kernels.reference` is their twin in numpy, with the same signatures.
"""
