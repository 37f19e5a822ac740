"""The ledger counts what is open, in each role's unit, and nothing after the end."""

from __future__ import annotations

import random

import pytest
from routing_fleets import fleet

from vllm_plugins.routing import Capacity, Ledger, Load, Role, Work
from vllm_plugins.routing.ledger import STALE_S

KV = Capacity(kv_blocks=100, block_size=16)


def test_prefill_counts_prompt_tokens_not_yet_computed():
    few, ledger = fleet("P0"), Ledger()
    ticket = ledger.open(few["P0"], Work(prompt_tokens=1000, output_tokens=50), 0.0)
    ledger.open(few["P0"], Work(prompt_tokens=10), 0.0)
    assert ledger.load(few["P0"]) == Load(requests=2, prefill_tokens=1010)
    ticket.progress(600)
    ticket.progress(500)
    assert ledger.backlog(few["P0"], 0.0) == 410
    ticket.progress(1001)
    assert ledger.backlog(few["P0"], 0.0) == 10


def test_decode_counts_blocks_promised_and_grows_with_longer_answers():
    few, ledger = fleet("D0", capacity=KV), Ledger()
    ticket = ledger.open(few["D0"], Work(prompt_tokens=17, output_tokens=31), 0.0)
    assert ledger.load(few["D0"]) == Load(requests=1, kv_blocks=3, kv_blocks_in_use=2)
    ticket.progress(16)
    assert ledger.load(few["D0"]) == Load(requests=1, kv_blocks=3, kv_blocks_in_use=3)
    ticket.progress(32)
    assert ledger.load(few["D0"]) == Load(requests=1, kv_blocks=4, kv_blocks_in_use=4)


def test_encode_counts_embeddings():
    few, ledger = fleet("E0"), Ledger()
    ticket = ledger.open(few["E0"], Work(encoder_tokens=576), 0.0)
    ticket.progress(76)
    assert ledger.backlog(few["E0"], 0.0) == 500


def test_closing_twice_or_progress_afterwards_changes_nothing():
    few, ledger = fleet("P0"), Ledger()
    ticket = ledger.open(few["P0"], Work(prompt_tokens=8), 0.0)
    ticket.close()
    ticket.close()
    ticket.progress(4)
    assert ledger.load(few["P0"]) == Load() and ledger.tickets(few["P0"]) == []


def test_work_cannot_be_negative():
    with pytest.raises(ValueError, match="cannot be negative"):
        Work(prompt_tokens=-1)


def test_tickets_die_with_their_instance():
    few, ledger = fleet("D0 D1", capacity=KV), Ledger()
    tickets = [ledger.open(few["D0"], Work(32, 32), float(i)) for i in range(3)]
    kept = ledger.open(few["D1"], Work(32, 32), 0.0)
    assert ledger.forget(few["D0"]) == tickets
    assert all(ticket.closed for ticket in tickets) and not kept.closed
    for ticket in tickets:
        ticket.close()
    assert ledger.load(few["D0"]) == Load() and ledger.load(few["D1"]).requests == 1


def test_a_ticket_keeps_its_role_and_capacity_when_the_instance_changes():
    few, ledger = fleet("P0 P1", roles="PD", capacity=Capacity(block_size=16)), Ledger()
    one = few.drain("P0")
    prefill = ledger.open(one, Work(prompt_tokens=100), 0.0)
    few.relabel("P0", Role.DECODE)
    decode = ledger.open(one, Work(100, 20), 0.0)
    one.capacity = Capacity(kv_blocks=50, block_size=128)
    decode.progress(60)
    assert ledger.load(one).prefill_tokens == 100 and ledger.load(one).kv_blocks == 10
    prefill.close()
    decode.close()
    assert ledger.load(one) == Load()


@pytest.mark.parametrize(
    ("running", "waiting", "foreign"),
    [(0, 0, 0), (1, 1, 0), (1, 3, 2), (9, 0, 0), (9, 1, 1)],
)
def test_only_waiting_requests_beyond_the_own_ones_are_added(running, waiting, foreign):
    few, ledger = fleet("P0"), Ledger()
    for tokens in (100, 300):
        ledger.open(few["P0"], Work(prompt_tokens=tokens), 0.0)
    ledger.observe(few["P0"], running, waiting, 0.0, 1.0)
    assert ledger.backlog(few["P0"], 1.0) == 400 + foreign * 200


def test_kv_use_beyond_the_own_is_added_until_it_is_stale():
    few, ledger = fleet("D0", capacity=KV), Ledger()
    ledger.open(few["D0"], Work(160, 160), 0.0)
    ledger.observe(few["D0"], 5, 0, 0.35, 1.0)
    assert ledger.backlog(few["D0"], 2.0) == pytest.approx(20 + 25)
    assert ledger.backlog(few["D0"], 1.0 + STALE_S + 0.1) == 20
    ledger.observe(few["D0"], 1, 0, 0.05, 10.0)
    assert ledger.backlog(few["D0"], 10.0) == 20


def oracle(tickets):
    """Load of one instance, counted afresh from its open tickets."""
    load = Load(requests=len(tickets))
    for ticket in tickets:
        work = ticket.work
        if ticket.role is Role.PREFILL:
            load.prefill_tokens += max(0, work.prompt_tokens - ticket.done)
        elif ticket.role is Role.ENCODE:
            load.encoder_tokens += max(0, work.encoder_tokens - ticket.done)
        else:
            answer = max(work.output_tokens, ticket.done)
            load.kv_blocks += -(-(work.prompt_tokens + answer) // 16)
            load.kv_blocks_in_use += -(-(work.prompt_tokens + ticket.done) // 16)
    return load


@pytest.mark.parametrize("seed", range(5))
def test_conservation_over_random_lives(seed):
    rng = random.Random(seed)
    few, ledger = fleet("E0 P0 P1 D0 D1", roles="EPD", capacity=KV), Ledger()
    tickets = []
    for _ in range(2000):
        one = rng.choice(list(few))
        act = rng.random()
        if act < 0.4:
            work = Work(rng.randrange(300), rng.randrange(300), rng.randrange(900))
            tickets.append(ledger.open(one, work, 0.0))
        elif act < 0.7 and tickets:
            rng.choice(tickets).progress(rng.randrange(500))
        elif act < 0.95 and tickets:
            rng.choice(tickets).close()
        elif act < 0.97:
            ledger.forget(one)
        else:
            one.active = rng.choice(list(Role))
        mine = [t for t in tickets if t.instance is one and not t.closed]
        assert ledger.load(one) == oracle(mine)
        assert ledger.tickets(one) == mine
    for ticket in tickets:
        ticket.close()
    assert all(ledger.load(one) == Load() for one in few)
