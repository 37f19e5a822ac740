"""What the matrix tries on one vLLM version: contracts, a served request per plug-in, pairs.

Runs in a process of its own that sees that version alone, and writes what it knows after every
trial, so that a crash costs the trials that follow and not those before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from vllm_plugins.arguments import flag
from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.process import interrupt_on_termination
from vllm_plugins.bench.server import Server, serve
from vllm_plugins.compat import trials
from vllm_plugins.compat.combinations import decide_all, names_of, own_plugins
from vllm_plugins.compat.contract import check_contracts
from vllm_plugins.compat.contracts import CONTRACTS
from vllm_plugins.errors import PluginError
from vllm_plugins.metrics import ACTIVE, PREFIX
from vllm_plugins.plugin import SCHEDULER_HOST, SchedulerPlugin, WorkerPlugin
from vllm_plugins.registry import enable, load, unmet_version

PASSED = "passed"
STOCK, STOCK_VISION = "stock", "stock, with images"
PYTHON = ".".join(platform.python_version_tuple()[:2])
PROMPT_WORDS, OUTPUT_TOKENS = 150, 24
# Words that both tiny models have.
PROMPT = " ".join(f"t{8 + (7 * i) % 50}" for i in range(PROMPT_WORDS))
# A step holds less than the prompt, so that every scheduler has something to decide.
STEP_ROWS = 64
SERVE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8",
         "--max-num-batched-tokens", str(STEP_ROWS),
         )  # fmt: skip
START_S = 600.0


class TrialError(AssertionError):
    """A trial did not pass; the message says why."""


@dataclass
class Outcome:
    """What is known about one version; each trial is ``passed``, or says why not.

    Attributes:
        refused: Plug-ins that do not start here by default, with the reason.
        needs: Plug-ins whose declaration excludes this version, with the range that they need.
    """

    version: str
    date: str = ""
    python: str = ""
    torch: str = ""
    seconds: float = 0.0
    identity: str = ""
    contracts: str = ""
    plugins: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Return what did not pass, in words."""
        trials = {"version": self.identity, "contracts": self.contracts}
        trials |= {**self.plugins, **self.pairs}
        return [f"{name}: {text or 'not run'}" for name, text in trials.items() if text != PASSED]


class VersionRun:
    """The trials of one version in order.

    Args:
        version: The version that this process is meant to see.
        model: Folder of a tiny model.
        vision: Folder of one that reads images.
        logs: Folder for the servers' logs.
        save: Called after every trial.
    """

    def __init__(
        self,
        version: str,
        model: Path,
        vision: Path,
        logs: Path,
        save: Callable[[Outcome], None],
    ) -> None:
        self.outcome = Outcome(version, time.strftime("%Y-%m-%d"), PYTHON)
        self._text_model, self._vision_model = model, vision
        self._logs = logs
        self._save = save
        self._texts: dict[str, str] = {}

    def run(self) -> None:
        """Run all trials; nothing that fails stops those after it."""
        outcome = self.outcome
        outcome.torch = metadata.version("torch")
        allowed = self._allowed()
        pairs = [p for p in decide_all() if not p.refusal and set(p.names) <= set(allowed)]
        # Declared first: what a crash keeps from running is then known not to have run.
        stocks = [STOCK, STOCK_VISION] if trials.needs_vision(allowed) else [STOCK]
        outcome.plugins = dict.fromkeys([*stocks, *allowed], "")
        outcome.pairs = dict.fromkeys((pair.key for pair in pairs), "")
        outcome.identity = self._try(self._identity)
        outcome.contracts = self._try(self._contracts)
        for name in allowed:
            outcome.plugins[name] = self._try(partial(self._serve, name))
        # Last, because an engine leaves traces in the environment that servers would inherit.
        for stock in stocks:
            outcome.plugins[stock] = self._try(partial(self._generate, stock, ()))
        for pair in pairs:
            outcome.pairs[pair.key] = self._try(partial(self._generate, pair.key, pair.names))
        self._compare(outcome.plugins)
        self._compare(outcome.pairs)
        self._save(outcome)

    def _allowed(self) -> list[str]:
        allowed = []
        for name in own_plugins():
            needed = unmet_version(load(name), Version(self.outcome.version))
            if needed:
                self.outcome.needs[name] = needed
                continue
            try:
                enable([trials.spec(name)])
                allowed.append(name)
            except PluginError as error:
                self.outcome.refused[name] = error.reason
        return allowed

    def _try(self, trial: Callable[[], object]) -> str:
        self._save(self.outcome)
        start = time.monotonic()
        try:
            trial()
        except (TrialError, BenchError) as error:
            return str(error)
        except Exception as error:
            # vLLM of another version can fail in any way; that is a result, not an accident.
            return f"{type(error).__name__}: {error}"
        finally:
            print(f"  {time.monotonic() - start:5.1f} s", flush=True)
        return PASSED

    def _identity(self) -> None:
        import vllm

        found = Version(vllm.__version__).public
        if found != self.outcome.version:
            raise TrialError(f"this is vLLM {found} at {vllm.__file__}")

    def _contracts(self) -> None:
        relied_on = [contract for contract in CONTRACTS if contract.applies]
        broken = check_contracts(relied_on)
        if broken:
            listed = "; ".join(map(str, broken))
            raise TrialError(f"{len(broken)} of {len(relied_on)} broken: {listed}")

    def _compare(self, results: dict[str, str]) -> None:
        """Turn a trial that passed into one that did not where its text is not stock's."""
        for name, text in self._texts.items():
            stock = self._texts.get(STOCK_VISION if _sees(name) else STOCK)
            if stock is None and name in results:
                results[name] = "stock vLLM gave nothing to compare with"
            elif text != stock and name in results:
                results[name] = f"greedy text differs from stock's: {text!r}, not {stock!r}"

    def _serve(self, name: str) -> None:
        self._texts[name] = self._served((name,))

    def _served(self, names: Sequence[str]) -> str:
        """Serve one request and return its text, checking who is on in the server."""
        label = "-".join(names)
        model = self._vision_model if trials.needs_vision(names) else self._text_model
        log = self._logs / f"{self.outcome.version}-{label}.log"
        exact = [w for k, v in trials.exact_with(names).items() for w in (flag(k), str(v))]
        words = [*SERVE, *exact, "--plugin", *map(trials.flag_word, names)]
        with serve(str(model), words, label, log, START_S) as server:
            self._check_server(server, names)
            return _completion(server)

    def _check_server(self, server: Server, names: Sequence[str]) -> None:
        found = Version(json.loads(_get(f"{server.url}/version"))["version"]).public
        if found != self.outcome.version:
            raise TrialError(f"the server is vLLM {found}")
        active = set(_active(_get(f"{server.url}/metrics")))
        if active != set(names):
            raise TrialError(f"/metrics shows {sorted(active)} as active, not {sorted(names)}")

    def _generate(self, key: str, names: Sequence[str]) -> None:
        from vllm import SamplingParams

        import vllm_plugins

        plugins = vllm_plugins.engine_args(*map(trials.flag_word, names))
        arguments = {**plugins, **trials.exact_with(names)}
        model = self._vision_model if _sees(key) else self._text_model
        with _engine(model, arguments) as llm:
            params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            (result,) = llm.generate([PROMPT], params, use_tqdm=False)
            self._texts[key] = str(result.outputs[0].text)
            running = _running_in(llm)
        if running != sorted(names):
            raise TrialError(f"the engine runs {running}, not {sorted(names)}")


def _sees(key: str) -> bool:
    """Whether a trial is on the model that reads images."""
    return key == STOCK_VISION or trials.needs_vision(names_of(key))


@contextmanager
def _engine(model: Path, arguments: dict[str, Any]) -> Iterator[Any]:
    """Run an engine in this process; they may follow one another."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=STEP_ROWS,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        **arguments,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def _running_in(llm: Any) -> list[str]:
    """Return the plug-ins that are on in the engine; their policies and listeners have to run."""
    from vllm_plugins.settings import enabled_plugins

    core = llm.llm_engine.engine_core.engine_core
    scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
    enabled = enabled_plugins(scheduler.vllm_config)
    # A plug-in with a policy may need none with its default options, and then no host.
    hosted = scheduler.vllm_config.scheduler_config.scheduler_cls == SCHEDULER_HOST
    for owner, attribute, kind, wanted in (
        (scheduler, "plugin_policies", SchedulerPlugin, hosted),
        (worker, "plugin_listeners", WorkerPlugin, True),
    ):
        count = sum(isinstance(item.plugin, kind) for item in enabled) if wanted else 0
        if len(getattr(owner, attribute, ())) != count:
            raise TrialError(f"{type(owner).__name__} does not have {count} {attribute}")
    return sorted(item.plugin.name for item in enabled)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def _active(metrics: str) -> Iterator[str]:
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == PREFIX + ACTIVE.name and sample.value == 1:
                yield sample.labels["plugin"]


def _completion(server: Server) -> str:
    body = {
        "model": server.model,
        "prompt": PROMPT,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)
    text = str(found["choices"][0]["text"])
    # Special tokens count, and do not show in the text.
    if found["usage"]["completion_tokens"] != OUTPUT_TOKENS:
        raise TrialError(f"asked for {OUTPUT_TOKENS} tokens, got {text!r}")
    return text


def main() -> int:
    """Run the trials of the version that this process sees."""
    parser = argparse.ArgumentParser(description="Try the plug-ins on one vLLM version.")
    parser.add_argument("version")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vision-model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the outcome")
    args = parser.parse_args()

    def save(outcome: Outcome) -> None:
        args.out.write_text(json.dumps(asdict(outcome), indent=1))

    with interrupt_on_termination():
        VersionRun(args.version, args.model, args.vision_model, args.out.parent, save).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
