"""``vllm-plugins doctor``: what is installed here, and which plug-ins can run on it."""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_plugins.cli.list import rows
from vllm_plugins.errors import PluginError
from vllm_plugins.registry import load
from vllm_plugins.versions import installed_vllm, require_supported_vllm, supported_window

if TYPE_CHECKING:
    from vllm_plugins.plugin import Requirements

HELP = "Check this installation, and say which plug-ins can run here and why not."
GENERAL_GROUP, ENTRY_POINT = "vllm.general_plugins", "vllm_plugins"
ALLOW_LIST, RUNNER_CHOICE = "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"
FINE, TROUBLE = 0, 1


@dataclass(frozen=True)
class Engine:
    """What vLLM itself says about this machine; empty where it was not asked or cannot tell."""

    platform: str = ""
    device: str = ""
    runner: str = ""
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether one plug-in can run here; every reason if not."""

    name: str
    distribution: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Everything that ``doctor`` reports."""

    python: str
    python_supported: str
    vllm: str | None
    vllm_supported: str
    vllm_tested: bool
    torch: str | None
    engine: Engine
    allow_list: str | None
    runner_choice: str | None
    entry_points: tuple[str, ...]
    problems: tuple[str, ...]
    plugins: tuple[Verdict, ...] = field(default=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 1 where the installation cannot serve with a plug-in."""
    diagnosis = diagnose()
    print(json.dumps(asdict(diagnosis), indent=1) if args.json else as_text(diagnosis))
    return TROUBLE if diagnosis.problems else FINE


def diagnose() -> Diagnosis:
    """Look at this installation; imports vLLM where a supported one is installed."""
    version, unsupported = installed_vllm(), _vllm_problem()
    engine = Engine() if unsupported else ask_engine()
    problems = [unsupported] if unsupported else []
    problems += [f"vLLM does not start here: {engine.error}"] if engine.error else []
    problems += _entry_point_problems()
    tested = version is not None and version.public in supported_window().tested
    return Diagnosis(
        python=host.python_version(),
        python_supported=metadata.metadata("vllm-plugins")["Requires-Python"],
        vllm=str(version) if version else None,
        vllm_supported=str(supported_window()),
        vllm_tested=tested,
        torch=_version("torch"),
        engine=engine,
        allow_list=os.environ.get(ALLOW_LIST),
        runner_choice=os.environ.get(RUNNER_CHOICE),
        entry_points=_own_entry_points(),
        problems=tuple(problems),
        plugins=tuple(_verdicts(version, unsupported, engine)),
    )


def _vllm_problem() -> str:
    try:
        require_supported_vllm()
    except PluginError as error:
        return f"{error.reason}; {error.mend}"
    return ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def ask_engine() -> Engine:
    """Ask vLLM for its platform, device, and the model runner of a plain configuration."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        # vLLM logs to standard output, which is the report's.
        with redirect_stdout(sys.stderr):
            from vllm.config import VllmConfig
            from vllm.platforms import current_platform

            device = str(current_platform.get_device_name())
            runner = "V2" if VllmConfig().use_v2_model_runner else "V1"
        return Engine(str(current_platform.device_type), device, runner)
    except Exception as error:
        # A broken driver or build can raise anything, and saying so is what this command is for.
        return Engine(error=f"{type(error).__name__}: {error}")


def _own_entry_points() -> tuple[str, ...]:
    points = metadata.entry_points(group=GENERAL_GROUP)
    return tuple(sorted({point.value for point in points if point.name == ENTRY_POINT}))


def _entry_point_problems() -> Iterator[str]:
    if not _own_entry_points():
        yield "vLLM cannot see the flag: the entry point is missing; reinstall vllm-plugins"
    allowed = os.environ.get(ALLOW_LIST)
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        wanted = ",".join([*filter(None, allowed.split(",")), ENTRY_POINT])
        yield f"{ALLOW_LIST}={allowed} hides the flag; set {ALLOW_LIST}={wanted} or unset it"


def _verdicts(version: Version | None, unsupported: str, engine: Engine) -> Iterator[Verdict]:
    for row in rows():
        source = f"{row.distribution} {row.version}"
        if row.error:
            yield Verdict(row.name, source, (f"does not load: {row.error}",))
            continue
        found = [unsupported] if unsupported else []
        found += reasons(load(row.name).requires, version, engine)
        yield Verdict(row.name, source, tuple(found))


def reasons(needs: Requirements, version: Version | None, engine: Engine) -> list[str]:
    """Return every reason why something with these requirements cannot run here."""
    found = []
    if version is not None and Version(version.public) not in SpecifierSet(
        needs.vllm, prereleases=True
    ):
        found.append(f"needs vLLM {needs.vllm}, found {version}")
    if engine.platform and needs.platforms is not None and engine.platform not in needs.platforms:
        names = " or ".join(sorted(needs.platforms))
        found.append(f"needs platform {names}, found {engine.platform}")
    if engine.runner and needs.runners is not None and engine.runner not in needs.runners:
        names = " or ".join(sorted(needs.runners))
        found.append(f"needs model runner {names}, found {engine.runner}")
    return found


def as_text(d: Diagnosis) -> str:
    """Return a diagnosis for people."""
    lines = [f"{name:<14} {value}" for name, value in _facts(d)]
    lines += ["", "plug-ins:"]
    for verdict in d.plugins:
        state = "; ".join(verdict.reasons)
        state = f"cannot run here: {state}" if state else "can run here"
        lines.append(f"  {verdict.name:<14} {state} ({verdict.distribution})")
    lines += ["", *(f"problem: {problem}" for problem in d.problems)]
    return "\n".join(lines + ([] if d.problems else ["no problem found"]))


def _facts(d: Diagnosis) -> Iterator[tuple[str, Any]]:
    yield "python", f"{d.python} (supported {d.python_supported})"
    tested = "tested" if d.vllm_tested else "not among the tested versions"
    yield "vllm", f"{d.vllm or 'not installed'} (supported {d.vllm_supported}; {tested})"
    yield "torch", d.torch or "not installed"
    yield "platform", d.engine.platform or "unknown"
    yield "device", d.engine.device or "unknown"
    chosen = "" if d.runner_choice is None else f" ({RUNNER_CHOICE}={d.runner_choice})"
    # Some features and, in older versions, some architectures decide otherwise.
    runner = f"{d.engine.runner}, unless the model asks for another" if d.engine.runner else ""
    yield "model runner", (runner or "unknown") + chosen
    yield ALLOW_LIST, "not set" if d.allow_list is None else d.allow_list
    yield "entry point", ", ".join(d.entry_points) or "missing"
