"""A Triton backend named `cpu` that compiles nothing: kernels run in Triton's interpreter.

vLLM's CPU build takes Triton's kernels, and with them model runner V2, for runnable where a backend
of that name is installed. It is installed by the entry point beside this folder, for processes that
have the folder above on their path; nothing of vLLM or Triton is replaced.
"""
