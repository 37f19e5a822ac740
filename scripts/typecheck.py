"""Run mypy over the whole package.

The folders at the root are subpackages only once installed, so mypy, which reads source trees,
would pass over them in silence. It is shown a tree of links in which they stand where they belong.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_tree(tree: Path) -> None:
    """Lay out the package under `tree` as it is installed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = settings["tool"]["setuptools"]["package-dir"]
    (tree / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    package = tree / "vllm_plugins"
    package.mkdir()
    for entry in (ROOT / "vllm_plugins").iterdir():
        (package / entry.name).symlink_to(entry)
    for name, folder in folders.items():
        if name != "vllm_plugins":
            (package / name.removeprefix("vllm_plugins.")).symlink_to(ROOT / folder)


def main() -> int:
    """Return mypy's exit status."""
    with tempfile.TemporaryDirectory() as tree:
        link_tree(Path(tree))
        cache = ROOT / ".mypy_cache"
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *sys.argv[1:]]
        return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
