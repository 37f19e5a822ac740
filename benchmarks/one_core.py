"""The environment of servers that share a machine in a benchmark, a core for each."""

from __future__ import annotations

import os

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def one_core_each() -> None:
    """Let servers that this process starts take one core each, whichever is free.

    What the environment says already stays.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
