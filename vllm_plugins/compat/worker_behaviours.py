"""Behaviours of vLLM's workers, scheduler and KV connectors that plug-ins with KV rely on."""

from __future__ import annotations

import ast
import inspect
import pickle
import textwrap
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_plugins.compat.behaviours import expect
from vllm_plugins.plugin import WORKER_HOST

KVSHARE = "vllm_plugins.kv_connectors.kvshare"
RUNNERS = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
)
ATTENTIONS = (
    "vllm.model_executor.models.llama:LlamaAttention",
    "vllm.model_executor.models.qwen2:Qwen2Attention",
    "vllm.model_executor.models.qwen3:Qwen3Attention",
)
# A LlamaAttention with a forward of its own.
MISTRAL_ATTENTION = "vllm.model_executor.models.mistral:MistralAttention"
MROPE_MODELS = (
    "vllm.model_executor.models.qwen2_vl:Qwen2VLForConditionalGeneration",
    "vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
)
CONNECTOR_HOSTS = (
    "vllm.v1.worker.kv_connector_model_runner_mixin",
    "vllm.v1.worker.gpu.kv_connector",
)


def _named(symbol: str) -> Any:
    module, _, name = symbol.partition(":")
    return getattr(import_module(module), name)


def _tree(thing: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def _module_source(name: str) -> str:
    """Return a module's source without importing it: another platform's may not import here."""
    spec = find_spec(name)
    expect(spec is not None and spec.origin is not None, f"there is no {name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


def results_carry_reports() -> None:
    """A step's result keeps an attribute of ours when executors pickle it."""
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_plugins.engine.step_reports import reports_of, with_reports

    told = with_reports(ModelRunnerOutput(["a"], {"a": 0}), {"name": lambda output: output.req_ids})
    expect(reports_of(pickle.loads(pickle.dumps(told))) == {"name": ["a"]}, "reports are lost")


def _calls(tree: ast.AST, name: str, owner: str = "") -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == name
            and owner in ("", ast.unparse(node.func.value))
        ):
            yield node


def _line_of(tree: ast.AST, name: str, owner: str = "") -> int:
    lines = [call.lineno for call in _calls(tree, name, owner)]
    expect(len(lines) == 1, f"{name} is called {len(lines)} times")
    return lines[0]


def worker_class_is_made_on_demand() -> None:
    """A worker's class is looked up with ``getattr``, so that the module can make it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_plugins.engine.worker_host import PLATFORM_WORKERS, WorkerHost

    found = resolve_obj_by_qualname(WORKER_HOST)
    stock = [f"{base.__module__}.{base.__name__}" for base in found.__mro__]
    expect(issubclass(found, WorkerHost), f"{WORKER_HOST} resolves to {found}")
    expect(bool(set(stock) & set(PLATFORM_WORKERS.values())), f"it derives from {stock}")


def platforms_choose_the_known_workers() -> None:
    """Without ``--worker-cls`` the platforms choose the workers that the host derives from."""
    from vllm_plugins.engine.worker_host import PLATFORM_WORKERS

    for device, worker in PLATFORM_WORKERS.items():
        source = _module_source(f"vllm.platforms.{device}")
        expect(f'"{worker}"' in source, f"'{device}' no longer chooses {worker}")


def _expect_stored(symbol: str, *wanted: str) -> None:
    """Expect that a class sets attributes, in whichever method."""
    stored = {
        node.attr
        for node in ast.walk(_tree(_named(symbol)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    missing = set(wanted) - stored
    expect(not missing, f"{symbol} does not set {', '.join(sorted(missing))}")


def attention_has_a_rotary_embedding() -> None:
    """The attention of each known decoder stack sets ``rotary_emb``."""
    for symbol in ATTENTIONS:
        _expect_stored(symbol, "rotary_emb")


def attention_is_called_with_queries_keys_and_values() -> None:
    """Each known decoder stack calls ``attn(q, k, v)`` once, keys with their positions in them."""
    for symbol in (*ATTENTIONS, MISTRAL_ATTENTION):
        forward = _tree(_named(symbol).forward)
        [call, *others] = _calls(forward, "attn")
        plain = len(call.args) == 3 and not call.keywords and not others
        expect(plain, f"{symbol}.forward calls attn as {ast.unparse(call)}")
        rotated = _line_of(forward, "rotary_emb") < _line_of(forward, "attn")
        expect(rotated, f"{symbol}.forward rotates after attn")


def layers_of_qwen3_vl_are_those_of_qwen3() -> None:
    """The decoder of Qwen3-VL is made of Qwen3's layers, or of a class that derives from theirs."""
    stack = _named("vllm.model_executor.models.qwen3_vl:Qwen3LLMModel")
    layer = getattr(stack, "decoder_layer_type", None)
    if layer is None:
        # Before 0.32 all stacks built as Qwen3's is had its very layers.
        source = inspect.getsource(_named("vllm.model_executor.models.qwen3:Qwen3Model"))
        expect("decoder_layer_type=Qwen3DecoderLayer" in source, "Qwen3 is made of other layers")
        return
    wanted = _named("vllm.model_executor.models.qwen3:Qwen3DecoderLayer")
    expect(issubclass(layer, wanted), f"its layers are {layer}")


def axes_count_the_tokens_of_text() -> None:
    """Known models with M-RoPE count a prompt's tokens on all axes, up to its first image."""
    import torch

    tower = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(
        video_token_id=6, vision_start_token_id=4, vision_end_token_id=5, vision_config=tower
    )
    expected = torch.arange(4).expand(3, -1)
    for symbol in MROPE_MODELS:
        cls = _named(symbol)
        for images in ((), ((4, 1, 1, 1, 1.0),)):
            model = SimpleNamespace(
                config=config,
                iter_mm_grid_thw=lambda features, images=images: iter(images),
                _get_mrope_input_positions=getattr(cls, "_get_mrope_input_positions", None),
            )
            tokens = list(range(10, 14 + len(images)))
            positions, delta = cls.get_mrope_input_positions(model, tokens, [])
            positions = torch.as_tensor(positions)[:, :4]
            expect(torch.equal(positions, expected), f"{symbol} gives text {positions.tolist()}")
            expect(bool(images) or delta == 0, f"{symbol} shifts what follows text by {delta}")


def runners_keep_groups_and_configuration() -> None:
    """Both model runners keep attention groups and KV cache configuration, and return the model."""
    for symbol in RUNNERS:
        runner = _named(symbol)
        _expect_stored(symbol, "attn_groups", "kv_cache_config")
        expect(hasattr(runner, "get_model"), f"{symbol} has no get_model")


def warm_up_names_its_requests() -> None:
    """The second runner's warm-up begins its requests' names as the worker host knows them."""
    from vllm_plugins.engine.worker_host import WARM_UP_IDS

    source = _module_source("vllm.v1.worker.gpu.warmup")
    for name in WARM_UP_IDS:
        expect(f'"{name}' in source or f'"{name[:-1]}"' in source, f"no request is {name}...")


def connector_exists_before_the_cache_is_ready() -> None:
    """A worker makes its KV connector while it initialises the KV cache, not after."""
    from vllm.v1.worker.gpu_worker import Worker

    source = inspect.getsource(Worker.initialize_from_config)
    expect("ensure_kv_transfer_initialized" in source, "the connector is made somewhere else")


def loads_between_steps_follow_the_forward() -> None:
    """Both runners call ``start_load_kv`` after the forward where no load is synchronous."""
    for name in CONNECTOR_HOSTS:
        source = _module_source(name)
        calls = list(_calls(ast.parse(source), "start_load_kv"))
        expect(len(calls) == 2, f"{name} calls start_load_kv at {len(calls)} places")
        expect("has_sync_kv_loads" in source, f"{name} no longer tells loads apart")


def orders_are_asked_for_before_tokens_count() -> None:
    """In a step, blocks are told of first, then orders asked for, then computed tokens counted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    tree = _tree(Scheduler.schedule)
    # Connectors of encoder caches have a method of the same name.
    told = _line_of(tree, "update_state_after_alloc", "self.connector")
    asked = _line_of(tree, "_build_kv_connector_meta")
    counted = _line_of(tree, "_update_after_schedule")
    expect(told < asked < counted, f"the order is {told}, {asked}, {counted}")
    later = _tree(Scheduler._update_after_schedule)  # noqa: SLF001
    added = [
        node
        for node in ast.walk(later)
        if isinstance(node, ast.AugAssign)
        and isinstance(node.target, ast.Attribute)
        and node.target.attr == "num_computed_tokens"
    ]
    expect(bool(added), "computed tokens are not counted in _update_after_schedule")


def hits_have_a_source_where_vllm_tells_them_apart() -> None:
    """A connector says whether its tokens come from the host or a peer, or vLLM does not ask."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    module = "vllm.v1.metrics.cache_hit_source"
    if not hasattr(KVConnectorBase_V1, "_cache_hit_source"):
        # Before 0.32 there was one count for all connectors.
        expect(find_spec(module) is None, "sources are told apart in another way")
        return
    missing = {"HOST", "P2P"} - set(_named(f"{module}:CacheHitSource").__members__)
    expect(not missing, f"there is no source {', '.join(sorted(missing))}")


def block_hashes_are_a_chain() -> None:
    """A block's hash follows from the one before, so a random one hides all that come after."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(4, hash_function)
    request = Request("contract", list(range(16)), SamplingParams(), None, block_hasher=hasher)
    before = list(request.block_hashes)
    expect(len(before) == 4, f"4 blocks have {len(before)} hashes")
    del request.block_hashes[1:]
    request.block_hashes.append(BlockHash(bytes(32)))
    request.update_block_hashes()
    after = request.block_hashes
    expect(len(after) == 4, f"{len(after)} hashes after an update")
    expect(after[0] == before[0], "a block before the random hash changed")
    expect(not set(after[1:]) & set(before), "a block after the random hash kept its own")


def connectors_may_name_their_module() -> None:
    """``kv_connector_module_path`` names a module of any package, which holds the connector."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    wanted = KVTransferConfig(**_named(f"{KVSHARE}.plugin:TRANSFER"))
    found = KVConnectorFactory.get_connector_class(wanted)
    expect(found is _named(f"{KVSHARE}.connector:KVShareConnector"), f"the factory finds {found}")
