"""Behaviours of vLLM's encoder cache that handing embeddings over (`epd`) relies on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_plugins.compat.behaviours import expect
from vllm_plugins.compat.recording_connector import Trial, agent, trial
from vllm_plugins.compat.worker_behaviours import _calls, _line_of, _named, _tree

EPD = "vllm_plugins.kv_connectors.epd"
EC_STATE = "vllm.distributed.ec_transfer.ec_transfer_state"
# Of the image: how many, and before which token.
EMBEDDINGS, OFFSET = 9, 20


@contextmanager
def _with_image(**answers: Any) -> Iterator[Trial]:
    """Have a request with an image at a place wait, on a server that may encode 1000 embeddings."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    with trial("ECRecorder") as tried:
        tried.scheduler.max_num_encoder_input_tokens = 1000
        tried.scheduler.encoder_cache_manager = EncoderCacheManager(1000)
        tried.connector.answers.update(answers)
        place = PlaceholderRange(OFFSET, EMBEDDINGS)
        tried.add(
            "a", 40, items=[MultiModalFeatureSpec(None, "image", "picture", place)],
            extra={"ec_transfer_params": {"picture": {}}},
        )  # fmt: skip
        yield tried


def a_request_that_misses_an_item_is_passed_over() -> None:
    """``ensure_cache_available`` is asked with the computed tokens; others run meanwhile."""
    with _with_image(ensure_cache_available=False) as tried:
        tried.add("b", 16)
        output, _ = tried.step()
        ran = output.num_scheduled_tokens
        expect(ran == {"b": 16}, f"ran beside a request that misses an item: {ran}")
        asked = [(request.request_id, computed) for request, computed
                 in tried.asked("ensure_cache_available")]  # fmt: skip
        expect(asked == [("a", 0)], f"asked about {asked}")


def a_chunk_ends_before_an_item_without_room() -> None:
    """Where the manager has no room, the text before the item runs, then the request is asked."""
    with _with_image() as tried:
        tried.scheduler.encoder_cache_manager.can_allocate = lambda *args: False
        output, _ = tried.step()
        ran = output.num_scheduled_tokens
        expect(ran == {"a": OFFSET}, f"ran: {ran}, and the item is at {OFFSET}")
        expect(not output.scheduled_encoder_inputs, "the item is encoded all the same")
        tried.connector.answers["ensure_cache_available"] = False
        output, _ = tried.step()
        expect(not output.num_scheduled_tokens, "a running request is not passed over")
        computed = tried.asked("ensure_cache_available")[-1][1]
        expect(computed == OFFSET, f"it was asked behind {computed} tokens")


def an_item_that_is_here_is_loaded() -> None:
    """An item that the connector has is told of and not encoded; any other is both."""
    for here, encoded in ((True, {}), (False, {"a": [0]})):
        with _with_image(has_cache_item=here) as tried:
            output, _ = tried.step()
            found = output.scheduled_encoder_inputs
            expect(found == encoded, f"has_cache_item {here}: the step encodes {found}")
            expect(tried.asked("has_cache_item") == [("picture",)], "asked about another item")
            told = [index for _, index in tried.asked("update_state_after_alloc")]
            expect(told == [0], f"has_cache_item {here}: told of the items {told}")


def the_manager_is_asked_before_the_connector() -> None:
    """Whether an item is cached, whether there is room, and whether the connector has it."""
    heard: list[str] = []

    def answering(name: str, answer: bool) -> Callable[..., bool]:
        def call(*args: Any) -> bool:
            heard.append(name)
            return answer

        return call

    with _with_image(has_cache_item=answering("has_cache_item", False)) as tried:
        manager = tried.scheduler.encoder_cache_manager
        manager.check_and_update_cache = answering("check_and_update_cache", False)
        manager.can_allocate = answering("can_allocate", True)
        tried.step()
        wanted = ["check_and_update_cache", "can_allocate", "has_cache_item"]
        expect(heard == wanted, f"the order is {heard}")


def a_request_whose_item_is_gone_fails() -> None:
    """Those that ``take_unavailable_requests`` names end with an error in the same step."""
    with _with_image(ensure_cache_available=False, take_unavailable_requests={"a"}) as tried:
        _, answers = tried.step()
        ended = [(item.request_id, str(item.finish_reason)) for item in answers]
        expect(ended == [("a", "error")], f"ended: {ended}")


def an_answer_carries_where_its_items_are() -> None:
    """What ``request_finished`` returns is in the answer; the request's own parameters are read."""
    with _with_image() as tried:
        seen = []

        def finished(request: Any) -> tuple[bool, Any]:
            seen.append((request.status.name, request.ec_transfer_params))
            return False, {"picture": {"here": 1}}

        tried.connector.answers["request_finished"] = finished
        _, answers = tried.step()
        expect(seen == [("FINISHED_LENGTH_CAPPED", {"picture": {}})], f"was told {seen}")
        params = [item.ec_transfer_params for item in answers]
        expect(params == [{"picture": {"here": 1}}], f"the answer carries {params}")


def the_manager_forgets_when_told_to() -> None:
    """Resetting the encoder cache resets the manager, of whatever class it is."""
    with _with_image() as tried:
        heard: list[str] = []
        tried.scheduler.encoder_cache_manager.reset = lambda: heard.append("reset")
        tried.scheduler.reset_encoder_cache()
        expect(heard == ["reset"], f"the manager heard {heard}")


def an_encode_server_and_its_widths_come_first() -> None:
    """Widths are measured before the scheduler is made, and its connector before the manager."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    source = inspect.getsource(EngineCore.__init__)
    measured, made = (source.find(name) for name in ("measure_encoder_output_widths(",
                                                     "= Scheduler("))  # fmt: skip
    expect(0 < measured < made, "widths are not measured before the scheduler is made")
    tree = _tree(Scheduler.__init__)
    last = max((call.lineno for call in _calls(tree, "create_connector")), default=0)
    manager = _line_of(tree, "create_manager")
    expect(0 < last < manager, f"connectors are made in line {last}, the manager in {manager}")


def epd_is_found_by_name() -> None:
    """VLLM finds our connector by its module and our encoder cache manager by its dotted name."""
    from vllm.config import ECTransferConfig
    from vllm.config.ec_manager_config import EncoderCacheManagerConfig
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    plugin = _named(f"{EPD}.plugin:__dict__")
    wanted = ECTransferConfig(
        ec_connector=plugin["CONNECTOR"], ec_connector_module_path=plugin["MODULE"],
        ec_role="ec_both",
    )  # fmt: skip
    connector = ECConnectorFactory.get_connector_class(wanted)
    expect(connector is _named(f"{EPD}.connector:EpdConnector"), f"the connector is {connector}")
    named = EncoderCacheManagerConfig(encoder_cache_manager_cls=plugin["MANAGER"])
    manager = named.get_encoder_cache_manager_obj()
    ours = _named(f"{EPD}.early_prefill:EpdEncoderCacheManager")
    expect(manager is ours, f"the manager is {manager}")


def _ec_hosts() -> dict[str, Any]:
    """Return what each model runner puts around the encoder."""
    v1 = _named("vllm.v1.worker.ec_connector_model_runner_mixin:ECConnectorModelRunnerMixin")
    v2 = _named("vllm.v1.worker.gpu.ec_connector:ActiveECConnector")
    return {
        "V1": lambda output, cache: v1.maybe_get_ec_connector_output(output, encoder_cache=cache),
        "V2": lambda output, cache: v2(None, cache).maybe_get_output(output),
    }


def runners_load_before_the_encoder_and_end_behind_it() -> None:
    """A server that only encodes is called to save, any other to load; both at the step's end."""
    with trial("ECRecorder") as tried, agent(EC_STATE, "_EC_CONNECTOR_AGENT", tried.connector):
        output, connector = tried.scheduler.schedule(), tried.connector
        given: list[dict[str, Any]] = []
        connector.answers["start_save_caches"] = lambda **kwargs: given.append(kwargs)
        for saves, loads in ((True, False), (False, True), (True, True)):
            vars(connector).update(_is_producer=saves, _is_consumer=loads)
            wanted = ["start_save_caches"] * saves + ["start_load_caches"] * loads
            for runner, host in _ec_hosts().items():
                connector.calls.clear()
                with host(output, {}):
                    connector.calls.append(("encoder", ()))
                heard = [name for name, _ in connector.calls]
                expect(heard == [*wanted, "encoder", "get_finished"], f"{runner} calls {heard}")
        expect(given == [{"encoder_cache": {}}] * 4, f"saving is asked for with {given}")
