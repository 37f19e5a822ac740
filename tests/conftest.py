"""Shared fixtures and the environment in which every test runs."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Tests use the model makers and the server of the examples, which are scripts, not a package.
sys.path[:0] = [str(ROOT / "examples" / "models"), str(ROOT / "examples" / "demo")]

# Before anything imports torch or vLLM. "nobind": vLLM would otherwise pin every process that the
# tests start to the same cores.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# A shell starts what it runs in the background with interrupts ignored, and tests send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

from tests import models, turns  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let whole files go one after another in the order that is least trouble."""
    items.sort(key=turns.place)


@pytest.fixture(scope="module", autouse=True)
def _turn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a file with the mark `alone` run beside no other."""
    with turns.turn(alone=request.node.get_closest_marker("alone") is not None):
        yield


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Take back the log level that a command under test sets for its own process, which is ours."""
    name, before = "VLLM_LOGGING_LEVEL", os.environ.get("VLLM_LOGGING_LEVEL")
    yield
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A tiny random Llama of the default shape; word `t7` is token 7."""
    return models.tiny_llama()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct; skips only where the package index is out of reach."""
    return models.smollm2()
