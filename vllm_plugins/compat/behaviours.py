"""Contracts that are not a name or a signature but something that upstream code does."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import pickle
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_plugins.compat.contract import ContractError
from vllm_plugins.metrics import OWN_DIRECTORY, PREFIX, VLLM_DIRECTORY, Metrics, MetricSpec
from vllm_plugins.plugin import SCHEDULER_HOST
from vllm_plugins.settings import KEY, PluginSettings


def expect(true: bool, otherwise: str) -> None:
    """Raise :class:`ContractError` with a message unless a condition is true."""
    if not true:
        raise ContractError(otherwise)


def entry_point_is_loaded() -> None:
    """VLLM finds our entry point in its general group, once."""
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    from vllm_plugins.activation import register

    found = load_plugins_by_group(DEFAULT_PLUGINS_GROUP)
    expect(found.get("vllm_plugins") is register, f"found only {sorted(found)}")


def server_parser_has_the_flag() -> None:
    """The parser of a server offers ``--plugin`` once the entry point has run."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_plugins.activation import register

    register()
    parser: argparse.ArgumentParser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = {flag for action in parser._actions for flag in action.option_strings}  # noqa: SLF001
    expect("--plugin" in flags, "the server's parser has no --plugin")


def _config_with(graph: str, **options: Any) -> Any:
    from vllm.config import VllmConfig

    settings = PluginSettings(graph, {"sarathi": options})
    return VllmConfig(additional_config={KEY: settings})


def options_change_the_hash_only_with_the_graph() -> None:
    """Options that change no graph leave the compile-cache key alone; the others change it."""
    plain = _config_with("{}", margin=1.2).compute_hash()
    expect(
        plain == _config_with("{}", margin=1.5).compute_hash(),
        "an option that changes no graph changes the compile-cache key",
    )
    expect(
        plain != _config_with('{"hip": {"top_k": 1}}', margin=1.2).compute_hash(),
        "an option that changes the graph does not change the compile-cache key",
    )


def settings_survive_pickling() -> None:
    """The configuration keeps our settings as they are, also across processes."""
    config = _config_with("{}", margin=1.2)
    for name, seen in (("validated", config), ("pickled", pickle.loads(pickle.dumps(config)))):
        settings = seen.additional_config.get(KEY)
        expect(isinstance(settings, PluginSettings), f"{name}: settings became {type(settings)}")
        expect(settings.options == {"sarathi": {"margin": 1.2}}, f"{name}: options were lost")


def scheduler_class_may_be_a_function() -> None:
    """The name of our factory resolves, and without one vLLM chooses as the factory does."""
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_plugins.engine.scheduler_host import create_scheduler

    config = VllmConfig().scheduler_config
    config.scheduler_cls = SCHEDULER_HOST
    expect(config.get_scheduler_cls() is create_scheduler, "the factory is not resolved")
    config.scheduler_cls = None
    for overlapping, wanted in ((True, AsyncScheduler), (False, Scheduler)):
        config.async_scheduling = overlapping
        found: Any = config.get_scheduler_cls()
        expect(found is wanted, f"async_scheduling={overlapping} chooses {found}")


def _source_tree(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def scheduler_is_made_by_keyword() -> None:
    """The engine passes the configuration to the scheduler class by keyword."""
    from vllm.v1.engine.core import EngineCore

    calls = [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(_source_tree(EngineCore.__init__))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Scheduler"
    ]
    wanted = {"vllm_config", "kv_cache_config", "structured_output_manager"}
    expect(len(calls) == 1, f"the engine makes {len(calls)} schedulers")
    expect(wanted <= calls[0], f"the scheduler is made with {sorted(map(str, calls[0]))}")


def schedule_reads_the_limits() -> None:
    """The stock method reads what the host sets, and no limit that the host does not know."""
    from vllm.v1.core.sched.scheduler import Scheduler

    tree = _source_tree(Scheduler.schedule)
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    missing = {"max_num_scheduled_tokens", "running", "max_num_running_reqs"} - read
    expect(not missing, f"schedule() no longer reads {', '.join(sorted(missing))}")
    known = {"max_num_scheduled_tokens", "max_num_running_reqs", "max_num_active_reqs"}
    # Length and LoRA limits hold per request and per adapter: no plan changes them.
    known |= {"max_model_len", "max_num_encoder_input_tokens", "max_loras"}
    unknown = {name for name in read if name.startswith("max_")} - known
    expect(not unknown, f"schedule() reads new limits: {', '.join(sorted(unknown))}")


@contextmanager
def _metrics_in(folder: str) -> Iterator[None]:
    """Let metrics be written to a folder of their own for the length of the block."""
    before = {name: os.environ.pop(name, None) for name in (VLLM_DIRECTORY, OWN_DIRECTORY)}
    os.environ[OWN_DIRECTORY] = folder
    try:
        yield
    finally:
        del os.environ[OWN_DIRECTORY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def metric_files_are_read() -> None:
    """What an engine writes is what a collector shows."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    specs = [
        MetricSpec("contract_a_total", "counter", "A counter."),
        MetricSpec("contract_b", "gauge", "A gauge."),
        MetricSpec("contract_c", "histogram", "A histogram.", (1.0, 2.0)),
    ]
    labels = {"engine": "0"}
    with tempfile.TemporaryDirectory() as folder, _metrics_in(folder):
        metrics = Metrics(specs, labels)
        metrics.inc("contract_a_total", 3)
        metrics.set("contract_b", 5)
        metrics.observe("contract_c", 1.5)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        found = {
            name: registry.get_sample_value(PREFIX + name, {**labels, **extra})
            for name, extra in (
                ("contract_a_total", {}),
                ("contract_b", {}),
                ("contract_c_bucket", {"le": "2.0"}),
                ("contract_c_sum", {}),
            )
        }
    wanted = {"contract_a_total": 3, "contract_b": 5, "contract_c_bucket": 1, "contract_c_sum": 1.5}
    expect(found == wanted, f"wrote {wanted}, read {found}")


def collector_survives_vllm() -> None:
    """VLLM serves the default registry, and its own clean-up leaves our collector in it."""
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector
    from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics

    spec = MetricSpec("contract_d", "gauge", "A gauge.")
    with tempfile.TemporaryDirectory() as folder, _metrics_in(folder):
        collector = MultiProcessCollector(None, folder)
        REGISTRY.register(collector)
        try:
            Metrics([spec], {}).set("contract_d", 7)
            unregister_vllm_metrics()
            shown = get_prometheus_registry().get_sample_value(f"{PREFIX}contract_d")
        finally:
            REGISTRY.unregister(collector)
    expect(shown == 7, f"the default registry shows {shown} instead of 7")
