"""vLLM's own scheduler, of a model without weights, with a connector that writes down its calls."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_plugins.compat.worker_behaviours import _named

BLOCK, BUDGET = 16, 64
TOKEN = 7
_KV_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_EC_BASE = "vllm.distributed.ec_transfer.ec_connector.base"
# What each kind of connector is made of, and its answers where a check gives no other.
_RECORDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "KVRecorder": (
        (f"{_KV_BASE}:KVConnectorBase_V1", f"{_KV_BASE}:SupportsHMA"),
        {
            "bind_gpu_block_pool": None,
            "on_new_request": None,
            "get_num_new_matched_tokens": (0, False),
            # Asked for from 0.32 on; before, a connector fills all groups.
            "get_loaded_kv_cache_group_ids": (0,),
            "update_state_after_alloc": None,
            "build_connector_meta": SimpleNamespace(),
            "update_connector_output": None,
            "request_finished_all_groups": (False, None),
            "has_pending_push_work": False,
            "handle_preemptions": None,
            "start_load_kv": None,
            "wait_for_layer_load": None,
            "save_kv_layer": None,
            "wait_for_save": None,
            "get_transfer_results": SimpleNamespace(
                finished_sending=set(), finished_recving=set(), failed_recving=set()
            ),
        },
    ),
    "ECRecorder": (
        (f"{_EC_BASE}:ECConnectorBase",),
        {
            "has_cache_item": False,
            "ensure_cache_available": True,
            "update_state_after_alloc": None,
            "build_connector_meta": SimpleNamespace(),
            "take_unavailable_requests": set(),
            "request_finished": (False, None),
            "start_save_caches": None,
            "start_load_caches": None,
            "save_caches": None,
            "get_finished": (None, None),
        },
    ),
}


def __getattr__(name: str) -> Any:
    # vLLM looks a connector up in the module that its configuration names.
    if name in _RECORDERS:
        return _recorder(name)
    raise AttributeError(name)


@functools.cache
def _recorder(name: str) -> type[Any]:
    """Make a class of connectors with ``calls``, and with ``answers`` by method."""
    bases, defaults = _RECORDERS[name]
    # No constructor: vLLM reads the signature of the one that a connector has.
    members: dict[str, Any] = {
        "calls": functools.cached_property(lambda connector: []),
        "answers": functools.cached_property(lambda connector: dict(defaults)),
    }
    members |= {method: _recording(method) for method in defaults}
    return type(name, tuple(map(_named, bases)), members)


def _recording(method: str) -> Callable[..., Any]:
    def call(connector: Any, *args: Any, **kwargs: Any) -> Any:
        connector.calls.append((method, args))
        answer = connector.answers[method]
        return answer(*args, **kwargs) if callable(answer) else answer

    return call


class Trial:
    """A scheduler of vLLM's and the recording connector in it.

    Args:
        scheduler: As the engine has it.
        connector: Its KV or EC connector.
    """

    def __init__(self, scheduler: Any, connector: Any) -> None:
        self.scheduler, self.connector = scheduler, connector

    def add(self, name: str, tokens: int, items: Any = None, extra: Any = None) -> Any:
        """Let a request for one token arrive; prompts share no beginning."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=1, ignore_eos=True, extra_args=extra)
        prompt = [ord(name), *range(1, tokens)]
        request = Request(name, prompt, params, None, mm_features=items)
        self.scheduler.add_request(request)
        return request

    def step(self, **transfers: Any) -> tuple[Any, list[Any]]:
        """Run a step, with what workers say of transfers; return its output and its answers."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        chunks = [self.scheduler.requests[name].is_prefill_chunk for name in names]
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] if chunk else [TOKEN] for chunk in chunks],
            kv_connector_output=KVConnectorOutput(**transfers) if transfers else None,
        )
        answers = self.scheduler.update_from_output(output, result)
        return output, [item for client in answers.values() for item in client.outputs]

    def asked(self, method: str) -> list[tuple[Any, ...]]:
        """Return the arguments of each call of a method."""
        return [args for name, args in self.connector.calls if name == method]

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@contextmanager
def trial(kind: str, blocks: int = 64, **settings: Any) -> Iterator[Trial]:
    """Make a scheduler with a recording connector.

    Args:
        kind: ``KVRecorder`` or ``ECRecorder``.
        blocks: Blocks of the KV cache.
        settings: Further fields of the connector's configuration.
    """
    from vllm.config import ECTransferConfig, KVTransferConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_plugins.simulator.config import make_config, write_model_config
    from vllm_plugins.simulator.engine import VirtualEngine

    prefix, config_class = ("kv", KVTransferConfig) if kind[0] == "K" else ("ec", ECTransferConfig)
    names = {"connector": kind, "connector_module_path": __name__, "role": f"{prefix}_both"}
    fields = {f"{prefix}_{key}": value for key, value in names.items()} | settings
    connector: Any = config_class(**fields)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            write_model_config(Path(folder)), block_size=BLOCK, max_model_len=1024,
            max_num_batched_tokens=BUDGET, max_num_seqs=8, enable_prefix_caching=False,
            **{f"{prefix}_transfer_config": connector},
        )  # fmt: skip
        scheduler: Any = VirtualEngine(config, Scheduler, lambda work: 0.0, blocks).scheduler
        yield Trial(scheduler, scheduler.connector or scheduler.ec_connector)


@contextmanager
def agent(state: str, name: str, connector: Any) -> Iterator[None]:
    """Make a connector that of this worker."""
    module = _named(f"{state}:__dict__")
    before, module[name] = module[name], connector
    try:
        yield
    finally:
        module[name] = before
