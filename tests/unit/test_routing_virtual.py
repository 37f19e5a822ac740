"""The virtual clock against closed forms, hand-made schedules and conservation."""

from __future__ import annotations

import random

import pytest

from vllm_plugins.errors import PluginError
from vllm_plugins.routing.stage_servers import (
    Clock,
    DecodeServer,
    Engine,
    PrefillServer,
    Sequence,
    TokenBatch,
)
from vllm_plugins.routing.stage_times import DecodeTimes, EncodeTimes, PrefillTimes, StageTimes
from vllm_plugins.routing.virtual import Request, Setup, Shape, _Flow, simulate

FREE = DecodeTimes(base_ms=0, request_ms=0, context_ms=0)


def times(
    prefill=(0.0, 1.0), decode=(10.0, 0.0, 0.0), encode=(0.0, 1.0), kv_blocks=1000, **more
) -> StageTimes:
    return StageTimes(
        prefill=PrefillTimes(base_ms=prefill[0], token_ms=prefill[1]),
        decode=DecodeTimes(base_ms=decode[0], request_ms=decode[1], context_ms=decode[2]),
        encode=EncodeTimes(base_ms=encode[0], token_ms=encode[1]),
        kv_blocks=kv_blocks,
        **more,
    )


def poisson(count, rate, lengths, seed=0):
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        requests.append(Request(now, *lengths(rng)))
    return requests


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_one_prefill_server_is_an_m_d_1_queue(load):
    service = 0.1
    requests = poisson(30_000, load / service, lambda rng: (100, 1), seed=3)
    outcomes = simulate(requests, Setup(times(), Shape(prefill=1), first_token="prefill"))
    mean = sum(one.ttft_s for one in outcomes) / len(outcomes)
    assert mean == pytest.approx(service + load * service / (2 * (1 - load)), rel=0.03)


def test_a_lone_request_takes_the_sum_of_its_stages():
    stage = times((5, 2), (10, 1, 0.5), (3, 1), transfer_ms_per_token=0.25)
    request = [Request(1.0, 20, 4, images=(10, 12))]
    # Two encoders in parallel, the longer image decides; prefill 45, transfer 5, then 4 steps of
    # 10 + 1 + 0.5 * context with contexts of 20 to 23.
    steps = [11 + 0.5 * context for context in (20, 21, 22, 23)]
    split = simulate(request, Setup(stage, Shape(encode=2, prefill=1, decode=1)))[0]
    assert split.ttft_s * 1e3 == pytest.approx(15 + 45 + 5 + steps[0])
    assert split.tpot_s * 1e3 == pytest.approx(sum(steps[1:]) / 3)
    early = Setup(stage, Shape(encode=2, prefill=1, decode=1), first_token="prefill")
    assert simulate(request, early)[0].ttft_s * 1e3 == pytest.approx(15 + 45)
    inline = simulate(request, Setup(stage, Shape(prefill=1, decode=1)))[0]
    assert inline.ttft_s * 1e3 == pytest.approx(3 + 22 + 45 + 5 + steps[0])
    together = simulate(request, Setup(stage, Shape(combined=1)))[0]
    assert together.ttft_s * 1e3 == pytest.approx(3 + 22 + 45)
    assert together.tpot_s * 1e3 == pytest.approx(sum(steps[:3]) / 3)


def test_quadratic_prefill_costs_the_same_whole_and_in_chunks():
    stage = PrefillTimes(base_ms=7, token_ms=0.1, token2_ms=0.01)
    assert stage.ms(100) == pytest.approx(7 + 10 + 100)
    assert stage.chunk_ms(0, 30) + stage.chunk_ms(30, 100) == pytest.approx(stage.ms(100) - 7)


def test_encoders_take_as_many_images_as_their_batch():
    stage = StageTimes(
        prefill=PrefillTimes(base_ms=0, token_ms=0),
        decode=FREE,
        encode=EncodeTimes(base_ms=10, token_ms=1, max_images=2),
        kv_blocks=100,
    )
    outcome = simulate([Request(0.0, 8, 1, (5, 5, 5))], Setup(stage, Shape(1, 1, 1)))[0]
    # One image begins at once, the two that came meanwhile share a batch.
    assert outcome.ttft_s * 1e3 == pytest.approx(15 + 20)


def test_a_colocated_step_serves_decodes_and_a_chunk_of_a_prompt():
    stage = times((5, 1), (10, 0, 0), token_budget=64)
    requests = [Request(0.0, 10, 100), Request(0.0151, 127, 2)]
    first, second = simulate(requests, Setup(stage, Shape(combined=1)))
    # The second arrives within the step that ends at 25 ms; then two steps of 63 prompt tokens
    # beside one decode, and one of the last token.
    ends = 25 + (10 + 63) + (10 + 63) + (10 + 1)
    assert second.first_token_s * 1e3 == pytest.approx(ends)
    assert first.end_s * 1e3 == pytest.approx(ends + (99 - 4) * 10)


class Recorder:
    """Counts what a server reports."""

    def __init__(self):
        self.events = []

    def note(self, what):
        return lambda: self.events.append(what)


def test_prefill_stops_while_held_kv_fills_its_cache():
    clock, seen = Clock(), Recorder()
    server = PrefillServer(clock, times(kv_blocks=5))
    for name in "abc":
        server.submit(32, 0, seen.note(name))
    clock.run()
    assert seen.events == ["a", "b"]
    server.release(32)
    clock.run()
    assert seen.events == ["a", "b", "c"]


def test_decode_accepts_by_the_threshold_and_in_order():
    clock, seen = Clock(), Recorder()
    server = DecodeServer(clock, times(kv_blocks=100, max_batch=1))
    for i, tokens in enumerate((64, 64, 16, 600, 16)):
        sequence = Sequence(tokens, 3, lambda: None, seen.note(f"end {i}"))
        server.offer(sequence, seen.note(f"pull {i}"))
    clock.run()
    # Two of 4 blocks each, then none; 4 are left when the first runs, so that one of 1 block is
    # taken; those 5 stop the one of 38, which stops the last one until it runs itself.
    expected = "pull 0, pull 1, pull 2, end 0, pull 3, end 1, end 2, pull 4, end 3, end 4"
    assert ", ".join(seen.events) == expected
    assert server._free_blocks == 100 and server._idle_blocks == 0


def test_decode_does_not_accept_what_does_not_fit():
    clock, seen = Clock(), Recorder()
    server = DecodeServer(clock, times(kv_blocks=10))
    server.offer(Sequence(144, 5, lambda: None, seen.note("end long")), seen.note("pull long"))
    server.offer(Sequence(32, 5, lambda: None, seen.note("end short")), seen.note("pull short"))
    clock.run()
    assert seen.events == ["pull long", "end long", "pull short", "end short"]


def test_a_full_cache_preempts_the_newest_and_computes_it_again():
    clock, seen = Clock(), Recorder()
    # Each grows from 2 to 6 of the 9 blocks.
    engine = Engine(clock, times((0, 1), kv_blocks=9))
    for name in ("old", "new"):
        engine.submit(Sequence(32, 64, seen.note(f"first {name}"), seen.note(name), todo=32))
    clock.run()
    assert seen.events == ["first old", "first new", "old", "new"]
    assert engine._free_blocks == 9 and engine._batch.context == 0
    # Both prompts in one step, 63 steps for the old one; the new one's context is computed again.
    assert clock.now > (64 + 63 * 10 + 32) / 1e3


def test_a_sequence_that_was_taken_out_ends_after_all_its_tokens():
    batch = TokenBatch(block_size=16)
    one = Sequence(32, 5, lambda: None, lambda: None)
    batch.join(one)
    for _ in range(3):
        assert batch.step()[1] == []
    batch.leave(one)
    assert (one.context, one.left, one.tokens) == (35, 2, 3)
    batch.step()
    batch.join(one)
    # The end that was noted at first is the next step.
    assert batch.step()[1] == []
    assert batch.step() == (0, [one])
    assert (one.context, one.left, one.tokens) == (37, 0, 5)


def test_a_batch_counts_every_block_that_is_entered():
    rng = random.Random(0)
    batch, blocks = TokenBatch(block_size=16), 0
    alive = []
    for _ in range(300):
        if rng.random() < 0.3:
            alive.append(Sequence(rng.randrange(1, 99), rng.randrange(1, 60), print, print))
            blocks += -(-alive[-1].context // 16)
            batch.join(alive[-1])
        contexts = [one.context + batch.age(one) for one in alive]
        assert batch.context == sum(contexts) and blocks == sum(-(-c // 16) for c in contexts)
        new_blocks, ended = batch.step()
        blocks += new_blocks - sum(-(-one.context // 16) for one in ended)
        alive = [one for one in alive if one not in ended]
        assert all(one.left == 0 for one in ended)


def test_the_preempted_come_before_those_who_wait():
    clock, seen = Clock(), Recorder()
    engine = Engine(clock, times((0, 1), kv_blocks=9))
    for name in ("old", "new"):
        engine.submit(Sequence(32, 64, seen.note(f"first {name}"), seen.note(name), todo=32))
    # It waits for 6 blocks from the start, and "new" for 5 once it has been preempted.
    late = Sequence(96, 1, seen.note("first late"), seen.note("late"), todo=96)
    clock.after(0.07, lambda: engine.submit(late))
    clock.run()
    assert seen.events == ["first old", "first new", "old", "new", "first late", "late"]


def test_decode_accepts_nobody_before_the_preempted_are_back():
    clock, seen = Clock(), Recorder()
    server = DecodeServer(clock, times((0, 1), kv_blocks=100))
    for name in ("old", "new"):
        server.offer(Sequence(64, 1000, lambda: None, seen.note(name)), lambda: None)
    # They outgrow the cache after 7.4 s; from then on half of it is free for the late one.
    late = Sequence(16, 1, lambda: None, seen.note("late"))
    clock.after(7.8, lambda: server.offer(late, seen.note("pull late")))
    clock.run()
    assert seen.events == ["old", "pull late", "late", "new"]


def test_answers_that_grow_beyond_the_mean_count_in_dispatch():
    requests = [Request(0.0, 16, 2000), Request(9.9, 160, 100), Request(10.2, 16, 10)]
    flow = _Flow(requests, Setup(times(), Shape(prefill=1, decode=2)))
    opened, names = flow.ledger.open, []

    def noted(instance, work, now):
        names.append(instance.id)
        return opened(instance, work, now)

    flow.ledger.open = noted
    flow.clock.run()
    # By the mean of 703 tokens the first one would hold fewer blocks than the second.
    assert [name for name in names if name.startswith("D")] == ["D0", "D1", "D1"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape", [Shape(combined=2), Shape(prefill=2, decode=2), Shape(2, 1, 1), Shape(1, combined=2)]
)
def test_conservation_of_requests_blocks_and_tickets(seed, shape):
    rng = random.Random(seed)
    requests = poisson(
        200,
        50.0,
        lambda rng: (
            rng.randrange(1, 300),
            rng.randrange(1, 300),
            tuple(rng.randrange(1, 99) for _ in range(rng.randrange(4))),
        ),
        seed,
    )
    # So small that sequences are preempted and prefill is held back.
    stage = times((1, 0.05), (2, 0.1, 0.001), (1, 0.1), kv_blocks=60, max_batch=8)
    first_token = rng.choice(["decode", "prefill"])
    flow = _Flow(requests, Setup(stage, shape, first_token=first_token))
    flow.clock.run()
    for request, outcome in zip(requests, flow.outcomes, strict=True):
        assert request.arrival_s < outcome.first_token_s <= outcome.end_s
    for server in [*flow._decodes.values(), *flow._engines.values()]:
        assert server._free_blocks == 60 and not server._batch.members
        assert server._batch.context == 0 and not any(server._batch._growing)
    assert all(server._held_blocks == 0 for server in flow._prefills.values())
    assert all(flow.ledger.load(one).requests == 0 for one in flow._fleet)
    assert not flow._decoding


def skewed(rng):
    return (8000 if rng.random() < 0.05 else 200, 20)


def p99(values):
    return sorted(values)[int(0.99 * len(values))]


@pytest.mark.parametrize("seed", range(5))
def test_least_backlog_has_no_longer_tails_than_round_robin_on_skewed_lengths(seed):
    stage = times((5, 0.1), (10, 0.05, 0.0005))
    requests = poisson(2000, 25.0, skewed, seed)
    setup = Setup(stage, Shape(prefill=4, decode=2))
    backlog = simulate(requests, setup)
    turns = simulate(requests, Setup(stage, setup.shape, "round-robin"))
    assert p99([o.ttft_s for o in backlog]) <= p99([o.ttft_s for o in turns])


def test_a_slow_instance_gets_less_of_the_work():
    stage = times((5, 0.1))
    requests = poisson(1000, 12.0, lambda rng: (1000, 5), seed=1)
    slow = Setup(stage, Shape(prefill=2, decode=1), prefill_slowdown=(3.0,))
    turns = Setup(stage, slow.shape, "round-robin", prefill_slowdown=(3.0,))
    longest = [p99([o.ttft_s for o in simulate(requests, s)]) for s in (slow, turns)]
    assert longest[0] < longest[1] / 2


def test_refusals():
    with pytest.raises(PluginError, match="1601 tokens does not fit into 100 KV blocks"):
        simulate([Request(0, 1600, 1)], Setup(times(kv_blocks=100), Shape(combined=1)))
    with pytest.raises(PluginError, match="none of them can prefill"):
        simulate([Request(0, 16, 1)], Setup(times(), Shape(decode=1)))
    for arguments in ((float("nan"), 1, 1), (-1.0, 1, 1), (0.0, 0, 1), (0.0, 1, 1, (0,))):
        with pytest.raises(ValueError, match=r"request|token"):
            Request(*arguments)
