"""Copy kernels; knows pointers, strides and streams, and nothing of hashes."""
