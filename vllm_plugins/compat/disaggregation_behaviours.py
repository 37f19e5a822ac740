"""Behaviours of vLLM that handing KV over (`pd`) relies on; `encoder_behaviours` has epd's.

Most are tried on vLLM's own scheduler with a connector that writes down what it is asked and
answers as it was told (`recording_connector`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from vllm_plugins.compat.behaviours import expect
from vllm_plugins.compat.recording_connector import BLOCK, Trial, agent, trial
from vllm_plugins.compat.worker_behaviours import _calls, _line_of, _named, _tree

PD = "vllm_plugins.kv_connectors.pd"
_ALLOCATED = "update_state_after_alloc"


def orders_are_asked_for_between_blocks_and_counts() -> None:
    """A connector hears of a request, of its blocks, and of the step, before tokens count."""
    with trial("KVRecorder") as tried:
        request = tried.add("a", 96)
        seen = []
        tried.connector.answers["build_connector_meta"] = lambda output: seen.append(
            (request.num_computed_tokens, output.num_scheduled_tokens["a"])
        )
        tried.step()
        tried.step()
        expect(seen == [(0, 64), (64, 32)], f"computed and scheduled tokens were {seen}")
        heard = [name for name, _ in tried.connector.calls[1:5]]
        wanted = ["on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc",
                  "build_connector_meta"]  # fmt: skip
        expect(heard == wanted, f"the order is {heard}")


def a_request_can_be_held_back() -> None:
    """``(None, False)`` passes a waiting request over, lets others start, and asks again."""
    with trial("KVRecorder") as tried:
        held, others = (None, False), (0, False)
        answers = tried.connector.answers
        answers["get_num_new_matched_tokens"] = lambda r, _: held if r.request_id == "a" else others
        tried.add("a", 32)
        tried.add("b", 32)
        first, _ = tried.step()
        expect(list(first.num_scheduled_tokens) == ["b"], f"ran: {first.num_scheduled_tokens}")
        answers["get_num_new_matched_tokens"] = others
        second, _ = tried.step()
        expect("a" in second.num_scheduled_tokens, "it was not asked again")


@contextmanager
def _pulling(tokens: int, **settings: Any) -> Iterator[Trial]:
    """Have a request wait for the KV of all its tokens."""
    with trial("KVRecorder", **settings) as tried:
        tried.connector.answers["get_num_new_matched_tokens"] = (tokens, True)
        tried.add("a", tokens)
        output, _ = tried.step()
        expect(not output.num_scheduled_tokens, "a request runs before its KV is here")
        yield tried


def a_pull_gets_blocks_and_then_the_last_token_runs() -> None:
    """Blocks for all promised tokens come first; once loaded, the last token is computed here."""
    with _pulling(3 * BLOCK) as tried:
        ((_, blocks, external),) = tried.asked(_ALLOCATED)
        (ids,) = blocks.get_block_ids()
        expect((len(ids), external) == (3, 3 * BLOCK), f"{len(ids)} blocks for {external} tokens")
        tried.step(finished_recving={"a"})
        output, _ = tried.step()
        ran = output.num_scheduled_tokens
        expect(ran == {"a": 1}, f"ran once all was loaded: {ran}")


def blocks_of_a_pull_are_not_zeroed() -> None:
    """Where new blocks are cleared, those of the groups that a connector says it fills are not."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    with patch.object(KVCacheConfig, "needs_kv_cache_zeroing", True), trial("KVRecorder") as tried:
        tried.connector.answers["get_num_new_matched_tokens"] = lambda request, _: (
            (3 * BLOCK, True) if request.request_id == "a" else (0, False)
        )
        tried.add("a", 3 * BLOCK)
        tried.add("b", 2 * BLOCK)
        output, _ = tried.step()
        given = {r.request_id: b.get_block_ids()[0] for r, b, _ in tried.asked(_ALLOCATED)}
        cleared = output.new_block_ids_to_zero
        expect(cleared == given["b"], f"of {given}, {cleared} are cleared")


def a_failed_pull_starts_over() -> None:
    """With ``recompute`` the request has no token, is asked about anew, and is computed here."""
    with _pulling(3 * BLOCK, kv_load_failure_policy="recompute") as tried:
        tried.connector.answers["get_num_new_matched_tokens"] = (0, False)
        tried.step(finished_recving={"a"}, failed_recving={"a"})
        output, _ = tried.step()
        ran = output.num_scheduled_tokens
        expect(len(tried.asked("get_num_new_matched_tokens")) == 2, "it was not asked anew")
        expect(ran == {"a": 3 * BLOCK}, f"ran after the failure: {ran}")


def a_failed_pull_can_fail_its_request() -> None:
    """With ``fail`` the request ends with an error."""
    with _pulling(3 * BLOCK, kv_load_failure_policy="fail") as tried:
        _, answers = tried.step(finished_recving={"a"}, failed_recving={"a"})
        reasons = [str(item.finish_reason) for item in answers]
        expect(reasons == ["error"], f"it ended with {reasons}")


def an_aborted_pull_keeps_its_blocks() -> None:
    """Blocks that are being filled are free only once the workers report, and they hear of it."""
    from vllm.v1.request import RequestStatus

    with _pulling(3 * BLOCK) as tried:
        held = tried.free
        tried.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
        expect(tried.free == held, "its blocks were freed while they are being filled")
        output, _ = tried.step(finished_recving={"a"})
        expect("a" in output.finished_req_ids, "the workers do not hear that it ended")
        expect(tried.free == held + 3, f"{tried.free - held} of 3 blocks are free after the report")


def kept_blocks_are_freed_on_the_workers_word() -> None:
    """A finished prompt's blocks stay, its answer names them, and the engine goes on stepping."""
    with trial("KVRecorder") as tried:
        seen: list[tuple[str, int, int]] = []

        def finished(request: Any, blocks: tuple[list[int], ...]) -> tuple[bool, Any]:
            seen.append((request.status.name, request.num_computed_tokens, len(blocks[0])))
            return True, {"name": 1}

        tried.connector.answers["request_finished_all_groups"] = finished
        before = tried.free
        tried.add("a", 40, extra={"kv_transfer_params": {"do_remote_decode": True}})
        _, answers = tried.step()
        expect(seen == [("FINISHED_LENGTH_CAPPED", 40, 3)], f"the connector was told {seen}")
        params = [item.kv_transfer_params for item in answers]
        expect(params == [{"name": 1}], f"the answer carries {params}")
        output, _ = tried.step()
        expect("a" in output.finished_req_ids, "the step of the orders does not name it")
        expect(tried.free == before - 3, "its blocks were freed before anybody pulled them")
        expect(tried.scheduler.has_requests(), "an engine that keeps blocks stops stepping")
        tried.step(finished_sending={"a"})
        expect(tried.free == before, "its blocks stay after they were pulled")
        expect(not tried.scheduler.has_requests(), "an engine without anything steps on")


def an_idle_engine_steps_for_orders() -> None:
    """An engine without requests steps while the connector has something to tell its workers."""
    with trial("KVRecorder") as tried:
        expect(not tried.scheduler.has_requests(), "it steps without a reason")
        tried.connector.answers["has_pending_push_work"] = True
        expect(tried.scheduler.has_requests(), "it does not step")


def orders_of_a_step_know_who_was_preempted() -> None:
    """``num_preemptions`` counts before the orders of the step that gives the blocks away."""
    with trial("KVRecorder", blocks=5) as tried:
        requests = [tried.add(name, 2 * BLOCK) for name in "ab"]
        for request in requests:
            request.max_tokens = 2
        seen: list[list[int]] = []
        tried.connector.answers["build_connector_meta"] = lambda _: seen.append(
            [request.num_preemptions for request in requests]
        )
        tried.step()
        tried.step()
        expect(seen == [[0, 0], [0, 1]], f"preemptions at the orders of two steps: {seen}")


def _kv_hosts() -> dict[str, Callable[[Any, Any], Any]]:
    """Return, for both model runners, what talks to a connector in a step without tokens."""
    v1 = _named("vllm.v1.worker.kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin")
    v2 = _named("vllm.v1.worker.gpu.kv_connector:ActiveKVConnector")
    return {
        "V1": v1.kv_connector_no_forward,
        "V2": lambda output, config: v2(config, {}).no_forward(output),
    }


def runners_report_ended_requests_after_the_loads() -> None:
    """Both runners start loads, then ask for results with the requests that have ended."""
    state = "vllm.distributed.kv_transfer.kv_transfer_state"
    for runner, host in _kv_hosts().items():
        with trial("KVRecorder") as tried, agent(state, "_KV_CONNECTOR_AGENT", tried.connector):
            output = tried.scheduler.schedule()
            output.finished_req_ids = {"a"}
            tried.connector.calls.clear()
            host(output, tried.scheduler.vllm_config)
            heard = [name for name, _ in tried.connector.calls if name != "handle_preemptions"]
            wanted = ["start_load_kv", "wait_for_save", "get_transfer_results"]
            expect(heard == wanted, f"{runner} calls {heard}")
            ended = tried.asked("get_transfer_results")
            expect(ended == [({"a"},)], f"{runner} says that {ended} ended")


def orders_reach_workers_before_blocks_are_written() -> None:
    """Both runners hand a step's orders over before its forward, also where nothing runs."""
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    tree = _tree(GPUModelRunner.execute_model)
    handed = _line_of(tree, "handle_preemptions")
    for later in ("_update_states", "kv_connector_no_forward", "_model_forward"):
        first = min((call.lineno for call in _calls(tree, later)), default=0)
        expect(handed < first, f"V1 calls {later} in line {first}, orders come in line {handed}")
    tree = _tree(ActiveKVConnector.pre_forward)
    handed, bound = (_line_of(tree, n) for n in ("handle_preemptions", "bind_connector_metadata"))
    expect(handed < bound, "V2 hands orders over after it has bound them")


def a_pull_is_over_when_all_workers_say_so() -> None:
    """A request is loaded once all workers have reported, and failed if one of them failed."""
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    def report(**said: Any) -> ModelRunnerOutput:
        return ModelRunnerOutput([], {}, kv_connector_output=KVConnectorOutput(**said))

    joined = KVOutputAggregator(2)
    failed = report(finished_recving={"a"}, failed_recving={"a"})
    results = []
    for outputs in ((failed, report()), (report(), report(finished_recving={"a"}))):
        whole = joined.aggregate(list(outputs))
        kv: Any = whole.kv_connector_output if whole is not None else None
        results.append((kv.finished_recving or set(), kv.failed_recving))
    expect(results == [(set(), set()), ({"a"}, {"a"})], f"the reports were joined to {results}")


def workers_introduce_themselves() -> None:
    """The engine hands the workers' introductions over, by pipeline and tensor rank."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.gpu_worker import Worker

    _line_of(_tree(EngineCore.__init__), "set_xfer_handshake_metadata_pp_aware")
    source = inspect.getsource(Worker.get_kv_connector_handshake_metadata)
    expect("{(pp_rank, tp_rank): metadata}" in source, "introductions have another key")


def a_connector_gets_the_pool() -> None:
    """``bind_gpu_block_pool`` gets the scheduler's pool while the scheduler is being made."""
    with trial("KVRecorder") as tried:
        pool = tried.scheduler.kv_cache_manager.block_pool
        expect(tried.asked("bind_gpu_block_pool") == [(pool,)], "it got no pool, or another one")


def a_connector_chooses_the_layout() -> None:
    """VLLM finds our connector by its module and lays the KV cache out as it says."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout
    from vllm.v1.kv_cache_layout import KVCacheLayout

    wanted = KVTransferConfig(
        kv_connector="PdConnector", kv_connector_module_path=f"{PD}.connector", kv_role="kv_both"
    )
    model = SimpleNamespace(use_mla=False)
    config: Any = SimpleNamespace(kv_transfer_config=wanted, model_config=model)
    found = get_kv_connector_cache_layout(config)
    expect(found in KVCacheLayout.__members__, f"vLLM has no layout '{found}'")
    order = KVCacheLayout[found].layer_view_order
    expect(order == (0, 1, 2, 3), f"'{found}' does not put heads outside of slots: {order}")


def caches_are_blocks_by_heads_by_slots() -> None:
    """A layer's cache is seen as blocks x KV heads x slots x bytes, whatever its strides."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, compute_layer_kv_cache_shape_bytes

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    found = compute_layer_kv_cache_shape_bytes(spec, 5)
    expect(found == (5, 2, 16, 2 * 32 * 4), f"the shape is {found}")


def layers_are_told_of_once_attention_has_run() -> None:
    """A layer's KV is announced behind its attention, which has written it."""
    from vllm.model_executor.layers.attention import attention, kv_transfer_utils, mla_attention

    tree = _tree(kv_transfer_utils.maybe_transfer_kv_layer)
    waited, saved = (_line_of(tree, name) for name in ("wait_for_layer_load", "save_kv_layer"))
    source = inspect.getsource(kv_transfer_utils.maybe_transfer_kv_layer).splitlines()
    between = "\n".join(source[waited : saved - 1])
    expect("result = func(" in between, "attention does not run between waiting and saving")
    for function in (
        attention.unified_attention_with_output,
        mla_attention.unified_mla_attention_with_output,
    ):
        expect(hasattr(function, "__wrapped__"), f"{function.__name__} is not wrapped")
