"""EPD between two real engines: an encode engine in a process of its own, a prefill engine here."""

import itertools
import random

import pytest
from vision import PATCHES, WIDTH, tiny_llava

from tests.epd_engine import HeldFetches, encode_engine, prefill_engine, prompt_of
from tests.models import make_engine

pytestmark = pytest.mark.engine

CASES = [[], [0], [1], [0, 1], [1, 0], [0, 0], [2, 0, 1], [0, 1, 0, 1], [3, 2, 1, 0],
         [4, 0, 1, 2, 3], [5, 4, 3, 2, 1, 0]]  # fmt: skip
IMAGES = 6
TOKENS = 8


@pytest.fixture(scope="module")
def colocated():
    """Tokens that one engine without plug-ins gives, by case."""
    from vllm import SamplingParams

    from tests.epd_engine import ENGINE

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with make_engine(tiny_llava(), **ENGINE) as llm:
        return {
            tuple(case): llm.generate([prompt_of(case)], params, use_tqdm=False)[0]
            .outputs[0]
            .token_ids
            for case in CASES
        }


@pytest.fixture(scope="module")
def encoder():
    with encode_engine() as encoder:
        yield encoder


# Only one engine may be up in a process: tests with one of their own come before `prefill`.


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 11, "max_num_seqs": 4},
        {"enable_prefix_caching": True, "plugin": "early_prefill=false"},
    ],
    ids=["chunks cut images", "prefix caching, no early prefill"],
)
def test_tokens_are_those_of_one_engine(colocated, encoder, settings):
    with prefill_engine(**settings) as prefill:
        for case in CASES:
            assert prefill.greedy(case, encoder.encode(case)) == colocated[tuple(case)], case
        assert prefill.counter.items == 0
        if "max_num_batched_tokens" in settings:
            assert max(n for step in prefill.steps for n in step.values()) == 11
            prefill.assert_idle()


def test_a_kv_producer_may_stand_beside_it(colocated, encoder, tmp_path):
    produce = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with prefill_engine(kv_transfer_config=produce) as prefill:
        assert prefill.greedy([2, 0, 1], encoder.encode([2, 0, 1])) == colocated[2, 0, 1]
        assert prefill.counter.items == 0
    # What it produced it did with the images in place.
    assert list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_workers_in_processes_of_their_own_map_the_arena(colocated, encoder):
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with prefill_engine(**parallel) as prefill:
        for case in CASES:
            assert prefill.greedy(case, encoder.encode(case)) == colocated[tuple(case)], case
        # Both have reported the last step with copies.
        assert prefill.side.memory.steps_done() > 0
        assert metric("epd_fetched_items_total") > 0
        prefill.assert_idle()


def test_what_cannot_be_had_is_encoded_here(colocated, encoder):
    with prefill_engine(plugin="on_missing=encode_local") as prefill:
        params = encoder.encode([0, 1])
        lost = next(iter(params))
        params[lost]["vllm_plugins_epd"]["generation"] = "0" * 32
        assert prefill.greedy([0, 1], params) == colocated[0, 1]
        assert prefill.counter.items == 1
        prefill.assert_idle()


def test_a_colocated_server_does_both(colocated, encoder):
    with prefill_engine(role="colocated") as both:
        assert both.greedy([0, 1], encoder.encode([0, 1])) == colocated[0, 1]
        assert both.counter.items == 0
        # What it is not asked to publish stays its own.
        both.greedy([2], None)
        assert both.side.arena.used_bytes == 2 * both.side.arena.block_bytes
        [(media, item)] = both.publish([3]).items()
        assert both.counter.items == 2
        both.empty_encoder_cache()
        assert both.greedy([3], {media: item}) == both.greedy([3], None)
        assert both.counter.items == 2


@pytest.fixture(scope="module")
def prefill(colocated, encoder):
    with prefill_engine() as prefill:
        yield prefill


@pytest.fixture
def idle(prefill):
    """The shared engine, with nothing cached before and nothing held after the test."""
    prefill.forget()
    prefill.steps.clear()
    prefill.counter.items = 0
    yield prefill
    prefill.assert_idle()


def metric(name, label=""):
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    from vllm_plugins.metrics import PREFIX, metrics_directory

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(metrics_directory()))
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == PREFIX + name and label in ("", *sample.labels.values())
    )


def test_tokens_are_those_of_one_engine_and_each_image_is_encoded_once(idle, encoder, colocated):
    before = encoder.ask("arena")["encoded"]
    fetched = metric("epd_fetched_items_total")
    for case in CASES:
        params = encoder.encode(case)
        assert encoder.answer["tokens"] == 0
        assert encoder.answer["reason"] == "stop"
        assert len(params) == len(set(case))
        assert idle.greedy(case, params) == colocated[tuple(case)], case
    assert encoder.answer["encoded"] - before <= IMAGES
    assert idle.counter.items == 0
    # Each image travels once, however many requests show it.
    assert metric("epd_fetched_items_total") - fetched == IMAGES
    assert metric("epd_reused_items_total") > 0


def test_the_arena_holds_what_the_encoder_gave(idle, encoder):
    [(media, source)] = encoder.encode([5]).items()
    idle.greedy([5], {media: source})
    entry = idle.side.arena.find(media)
    assert (entry.shape.num_tokens, entry.shape.width) == (PATCHES, WIDTH)
    rows = idle.side.memory.rows(entry.blocks, entry.shape, 0, PATCHES)
    assert b"".join(rows).hex() == encoder.ask("rows", media=media)["rows"]


def test_what_is_loaded_is_what_the_arena_holds(idle, encoder, colocated):
    params = encoder.encode([1])
    assert idle.greedy([1], params) == colocated[1,]
    idle.empty_encoder_cache()
    [media] = params
    entry = idle.side.arena.find(media)
    for piece in idle.side.memory.rows(entry.blocks, entry.shape, 0, PATCHES):
        piece[3::4] = bytes(len(piece[3::4]))
    assert idle.greedy([1], params) != colocated[1,]


def test_a_flipped_byte_fails_the_request_and_no_other(idle, encoder, colocated):
    params = encoder.encode([6])
    [media] = params
    encoder.ask("damage", media=media)
    damaged = metric("epd_missing_items_total", "damaged")
    name = idle.add([6], params)
    assert idle.finish()[name].finish_reason == "error"
    assert metric("epd_missing_items_total", "damaged") == damaged + 1
    assert idle.greedy([0], encoder.encode([0])) == colocated[0,]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_text_is_prefilled_while_images_arrive_in_any_order(idle, encoder, colocated, order):
    case = [2, 0, 1]
    params = encoder.encode(case)
    medias = list(params)
    early = metric("epd_early_prefill_tokens_total")
    idle.side.prefill.fetcher = held = HeldFetches(idle.side.fetcher)
    try:
        name = idle.add(case, params)
        # Fetching starts before the first step.
        assert set(held.held) == set(medias)
        idle.engine.step()
        assert idle.steps == [{name: 2}]
        other = idle.add([], None)
        ended = idle.finish(until=lambda ended: other in ended)
        assert list(ended[other].token_ids) == colocated[()]
        assert sum(step.get(name, 0) for step in idle.steps) == 2
        here = set()
        for index in order:
            held.let_go(medias[index])
            here.add(index)
            wait_until_here(idle, medias[index])
            idle.engine.step()
            idle.engine.step()
            computed = sum(step.get(name, 0) for step in idle.steps)
            ahead = next((i for i in range(3) if i not in here), None)
            if ahead is not None:
                # An image and the token behind it follow one another.
                assert computed == 2 + ahead * (PATCHES + 1)
        assert list(idle.finish()[name].token_ids) == colocated[tuple(case)]
    finally:
        idle.side.prefill.fetcher = idle.side.fetcher
    assert metric("epd_early_prefill_tokens_total") > early


def test_a_request_may_arrive_before_its_images_are_encoded(idle, encoder, colocated):
    known = encoder.encode([4])
    case, ids = [2, 0, 1], ["late-2", "late-0", "late-1"]
    name = idle.add(case, encoder.await_params(ids, known), ids=ids)
    while not idle.steps:
        idle.engine.step()
    for _ in range(20):
        idle.engine.step()
    assert idle.steps == [{name: 2}]
    encoder.encode([2, 0], ids=ids[:2])
    wait_until_here(idle, ids[0])
    wait_until_here(idle, ids[1])
    idle.engine.step()
    encoder.encode([1], ids=ids[2:])
    assert list(idle.finish()[name].token_ids) == colocated[tuple(case)]
    assert idle.counter.items == 0


def wait_until_here(prefill, media):
    while prefill.side.arena.find(media) is None:
        prefill.engine.step()


def test_a_lost_item_fails_its_request_and_leaves_the_engine_alive(idle, encoder, colocated):
    params = encoder.encode([7, 0])
    lost = next(iter(params))
    params[lost]["vllm_plugins_epd"]["generation"] = "0" * 32
    gone = metric("epd_missing_items_total", "gone")
    name = idle.add([7, 0], params)
    assert idle.finish()[name].finish_reason == "error"
    assert metric("epd_missing_items_total", "gone") == gone + 1
    assert idle.greedy([0], encoder.encode([0])) == colocated[0,]
    assert idle.counter.items == 0


@pytest.mark.parametrize(
    "change",
    [
        {"address": {"host": "10.0.0.1", "port": 80}},
        {"address": "127.0.0.1:80"},
        {"num_tokens": PATCHES + 1},
        {"width": 1 << 40},
        {"dtype": "object"},
    ],
    ids=["remote", "not-an-address", "tokens", "width", "dtype"],
)
def test_forged_parameters_fail_their_request_alone(idle, encoder, colocated, change):
    params = encoder.encode([0])
    [media] = params
    params[media]["vllm_plugins_epd"] |= change
    name = idle.add([0], params)
    other = idle.add([], None)
    ended = idle.finish()
    assert ended[name].finish_reason == "error"
    assert list(ended[other].token_ids) == colocated[()]


def test_aborts_at_any_time_leave_nothing_held(idle, encoder):
    rng = random.Random(0)
    idle.side.prefill.fetcher = held = HeldFetches(idle.side.fetcher)
    try:
        for _ in range(30):
            case = rng.sample(range(8), rng.randint(1, 4))
            name = idle.add(case, encoder.encode(case))
            for _ in range(rng.randint(0, 3)):
                idle.engine.step()
                for media in rng.sample(sorted(held.held), len(held.held) // 2):
                    held.let_go(media)
            if rng.random() < 0.7:
                idle.engine.abort_request([name])
            idle.side.arena.check()
        while idle.engine.has_unfinished_requests() or held.held:
            for media in list(held.held):
                held.let_go(media)
            idle.engine.step()
        while idle.side.prefill._fetching:
            idle.engine.step()
    finally:
        idle.side.prefill.fetcher = idle.side.fetcher
    assert idle.counter.items == 0
    encoder.ask("arena")


def test_a_preempted_request_finds_its_items_again(idle, encoder, colocated):
    case = [2, 0, 1]
    name = idle.add(case, encoder.encode(case))
    while not any(step.get(name) == 1 for step in idle.steps):
        idle.engine.step()
    idle.scheduler.reset_prefix_cache(reset_running_requests=True)
    idle.empty_encoder_cache()
    assert list(idle.finish()[name].token_ids) == colocated[tuple(case)]


def test_nothing_is_kept_when_the_encoder_cache_is_reset(idle, encoder):
    idle.greedy([1], encoder.encode([1]))
    assert idle.side.arena.used_bytes > 0
    idle.llm.llm_engine.reset_encoder_cache()
    assert idle.side.arena.used_bytes == 0


def test_an_item_that_is_here_needs_no_parameters(idle, encoder, colocated):
    assert idle.greedy([1], encoder.encode([1])) == colocated[1,]
    idle.empty_encoder_cache()
    assert idle.greedy([1], None) == colocated[1,]
    assert idle.counter.items == 0
