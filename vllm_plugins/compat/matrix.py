"""The version matrix: every plug-in on every supported vLLM. ``make matrix`` runs it.

Runs in a checkout, in the environment that holds the newest supported vLLM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from vllm_plugins.bench.process import logged_process
from vllm_plugins.compat import grid
from vllm_plugins.compat.one_version import Outcome
from vllm_plugins.compat.site import (
    CACHE,
    SiteError,
    environment,
    project_folder,
    site_folder,
)
from vllm_plugins.versions import supported_window

MODEL_MAKER = Path("examples/models/tiny.py")
# Enough layers for plug-ins that treat the lower ones and the upper ones differently.
LAYERS = 4
MODEL = Path(f".cache/models/tiny-llama-layers{LAYERS}")
VISION_MAKER = Path("examples/models/vision.py")
DRAFTER_MAKER = Path("examples/models/drafter.py")
RESULTS = CACHE / "results"
LIMIT_S = 1800.0
# Each keeps one core busy, and while one installs, starts or waits, another computes.
AT_A_TIME = 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Try every plug-in on every supported vLLM.")
    parser.add_argument(
        "--versions",
        metavar="V,V,...",
        help="try only these and write no page (default: the tested window)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail if the committed grid differs in anything but dates; write nothing",
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="keep the results that are there from an interrupted run",
    )
    return parser.parse_args(arguments)


def try_version(version: str, project: Path, vision: Path, reuse: bool = False) -> Outcome:
    """Run all trials of one version in a process that sees it, and return the outcome.

    Args:
        version: The vLLM version.
        project: Folder with this project installed.
        vision: Folder of a tiny model that reads images.
        reuse: Whether to keep an outcome that is there.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{version}.json"
    if not reuse or not out.exists():
        out.unlink(missing_ok=True)
        start = time.monotonic()
        reason = _run(version, project, vision, out)
        _amend(out, version, reason, time.monotonic() - start)
    return read(out)


def _run(version: str, project: Path, vision: Path, out: Path) -> str:
    """Run the trials; return why the process did not come to its end, or nothing."""
    try:
        folder = site_folder(version)
    except SiteError as error:
        return str(error)
    command = [sys.executable, "-m", "vllm_plugins.compat.one_version", version,
               "--model", str(MODEL.resolve()), "--vision-model", str(vision.resolve()),
               "--out", str(out.resolve())]  # fmt: skip
    log = out.with_suffix(".log")
    with logged_process(command, log, environment(folder, project)) as process:
        try:
            code = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"not finished after {LIMIT_S:.0f} s (see {log})"
    return f"its process ended with {code} (see {log})" if code else ""


def _amend(out: Path, version: str, reason: str, seconds: float) -> None:
    outcome = read(out) if out.exists() else Outcome(version)
    outcome.seconds = round(seconds, 1)
    if reason:
        outcome.identity = reason
    out.write_text(json.dumps(asdict(outcome), indent=1))


def read(out: Path) -> Outcome:
    """Read an outcome that a run has left."""
    return Outcome(**json.loads(out.read_text()))


def run_all(versions: Sequence[str], vision: Path, reuse: bool) -> list[Outcome]:
    """Try versions, printing each outcome in their order.

    The last one starts first: on the newest all plug-ins run, which takes as long as three others.
    """
    outcomes = []
    project = project_folder()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        trials = {
            version: pool.submit(try_version, version, project, vision, reuse)
            for version in reversed(versions)
        }
        for version in versions:
            outcome = trials[version].result()
            outcomes.append(outcome)
            failures = outcome.failures()
            verdict = f"{len(failures)} failed" if failures else "all passed"
            print(f"vLLM {version}: {verdict} in {outcome.seconds:.0f} s", flush=True)
            for failure in failures:
                print(f"  {failure}", flush=True)
    return outcomes


def write_pages(outcomes: Sequence[Outcome]) -> None:
    """Write the grid into the documentation and, between its markers, into the README."""
    grid.PAGE.write_text(grid.page(outcomes))
    if grid.README.exists():
        grid.README.write_text(grid.with_table(grid.README.read_text(), outcomes))


def stale_pages(outcomes: Sequence[Outcome]) -> list[Path]:
    """Return the committed pages that say something else than these outcomes."""
    wanted = {grid.PAGE: grid.page(outcomes)}
    if grid.README.exists():
        wanted[grid.README] = grid.with_table(grid.README.read_text(), outcomes)
    return [
        path
        for path, text in wanted.items()
        if not path.exists() or grid.without_dates(path.read_text()) != grid.without_dates(text)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 if a version that is listed as tested fails, or a page is stale."""
    args = parse(arguments)
    if not MODEL_MAKER.exists():
        print(f"{MODEL_MAKER} is missing: run this in a checkout of the project", file=sys.stderr)
        return 2
    maker = [sys.executable, str(MODEL_MAKER), str(MODEL), "--layers", str(LAYERS)]
    subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
    made = subprocess.run(
        [sys.executable, str(VISION_MAKER)], check=True, stdout=subprocess.PIPE, text=True
    )
    vision = Path(made.stdout.splitlines()[-1])
    drafter = [sys.executable, str(DRAFTER_MAKER), str(vision)]
    subprocess.run(drafter, check=True, stdout=subprocess.DEVNULL)
    chosen = args.versions.split(",") if args.versions else list(supported_window().tested)
    outcomes = run_all(chosen, vision, args.reuse)
    print("\n" + grid.table(outcomes))
    stale = stale_pages(outcomes) if args.check and not args.versions else []
    for path in stale:
        print(f"{path} is stale: run `make matrix` and commit it", file=sys.stderr)
    if not args.check and not args.versions:
        write_pages(outcomes)
    return 1 if stale or any(outcome.failures() for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
