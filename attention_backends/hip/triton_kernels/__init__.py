"""HiP's kernels for CUDA, in Triton: selection, decode, prefill, and operators to call them."""
