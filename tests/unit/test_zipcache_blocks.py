"""The life of blocks under random schedules: nothing stale is read, nothing is lost."""

import random

import numpy as np
import pytest
import torch

from tests.unit.zipcache_steps import Steps, exact
from vllm_plugins.attention_backends.zipcache import cpu_kernels, torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED
from vllm_plugins.attention_backends.zipcache.saliency import Probing

N = 32
KERNELS = cpu_kernels if cpu_kernels.library() is not None else torch_kernels


def states(steps, request):
    kinds = {True: "raw", False: "staged"}
    found = [int(steps.life.state[block]) for block in request.blocks]
    return ["sealed" if x == SEALED else kinds[x <= RAW] for x in found]


def assert_idle(steps):
    """Nothing is held: no rows, no staging, no requests."""
    life = steps.life
    assert not life._requests and not life._staged and not life._prompts
    assert sorted(life._free_rows) == list(range(life.options.rows))
    assert sorted(life._free_staging) == list(range(life.options.staged))
    assert life._requests == {}


def test_a_prompt_is_staged_until_its_end_and_sealed_before_the_next_step():
    steps = Steps(KERNELS)
    request = steps.request("a", 3 * N + 5, 4 * N + 1)
    steps.step((request, N + 3))
    assert states(steps, request) == ["staged", "raw"]
    steps.step((request, N))
    assert states(steps, request) == ["staged", "staged", "raw"]
    steps.step((request, N + 2))
    assert states(steps, request) == ["staged"] * 3 + ["raw"]
    steps.step((request, 1))
    assert states(steps, request) == ["sealed"] * 3 + ["raw"]
    for _ in range(N - 6):
        steps.step((request, 1))
    # Full, but its last query has only just scored it.
    assert states(steps, request) == ["sealed"] * 3 + ["raw"]
    steps.step((request, 1))
    assert states(steps, request) == ["sealed"] * 4 + ["raw"]
    assert steps.life.sealed == {"prompt": 3, "decode": 1, "ended": 0, "pressure": 0}


@pytest.mark.parametrize("salient", [0, N])
@pytest.mark.parametrize("of_keys", [0, N])
def test_without_a_choice_prompts_are_sealed_as_they_are_written(salient, of_keys):
    steps = Steps(KERNELS, salient=salient, of_keys=of_keys, staged=0)
    request = steps.request("a", 2 * N + 3, 3 * N)
    steps.step((request, N + 1))
    assert states(steps, request) == ["sealed", "raw"]
    steps.step((request, N + 2))
    assert states(steps, request) == ["sealed", "sealed", "raw"]
    # As where there is a choice, every block counts once.
    for _ in range(N - 3):
        steps.step((request, 1))
    steps.step(finished=(request,))
    assert steps.life.sealed == {"prompt": 2, "decode": 0, "ended": 1, "pressure": 0}


@pytest.mark.parametrize("how", ["finished", "preempted"])
def test_the_end_of_a_request_seals_its_full_blocks(how):
    steps = Steps(KERNELS)
    staged, filled = steps.request("a", 4 * N, 4 * N), steps.request("b", N - 1, N)
    steps.step((staged, 2 * N + 1), (filled, N - 1))
    steps.step((filled, 1))
    blocks = [*staged.blocks, *filled.blocks]
    steps.step(**{how: (staged, filled)})
    assert [int(x) for x in steps.life.state[blocks[:2]]] == [SEALED] * 2
    assert int(steps.life.state[blocks[3]]) == SEALED
    assert steps.life.sealed["ended"] == 3
    if how == "finished":
        assert_idle(steps)


def test_full_staging_seals_the_oldest_blocks_but_not_this_steps():
    steps = Steps(KERNELS, staged=4)
    one, two = steps.request("a", 9 * N, 9 * N), steps.request("b", 9 * N, 9 * N)
    steps.step((one, 2 * N), (two, N))
    steps.step((one, N), (two, 2 * N))
    assert states(steps, one) == ["sealed", "sealed", "staged"]
    assert states(steps, two) == ["staged", "staged", "staged"]
    steps.step((one, 2 * N), (two, 2 * N))
    assert states(steps, one)[-2:] == states(steps, two)[-2:] == ["staged"] * 2
    assert steps.life.sealed["pressure"] == 6


def test_counts_are_those_of_the_probes_that_saw_a_token():
    probing = Probing(0.05, 0.1, 7)
    steps = Steps(KERNELS, probing=probing)
    length = 4 * N + 9
    request = steps.request("a", length, length)
    for n in (40, 64, length - 104):
        steps.step((request, n))
    probes = probing.chosen(0, length, length)
    wanted = [int((probes >= x).sum()) for x in range(length)]
    life = steps.life
    found = [life._staged[block].seen for block in request.blocks[:4]]
    found.append(life._row_seen[RAW - int(life.state[request.blocks[4]])][:9])
    assert np.concatenate(found).tolist() == wanted


def test_a_shared_block_is_read_in_every_state():
    """In the step in which it is filled, while it is staged, and sealed; by decodes as well."""
    for when in ("same step", "staged", "sealed", "filled by a decode"):
        steps = Steps(KERNELS, salient=N, chooses=True, scaled=False)
        decoded = when == "filled by a decode"
        owner = steps.lossless("a", (2 * N - 1) if decoded else 3 * N, 4 * N)
        reader = steps.lossless("b", 2 * N + 5, 3 * N)
        if decoded:
            steps.step((owner, 2 * N - 1))
            own = 1
        elif when == "same step":
            own = 2 * N
        else:
            steps.step((owner, 2 * N if when == "staged" else 3 * N))
            own = N if when == "staged" else 1
        # The scheduler gives blocks to both before the step.
        need = -(-(owner.computed + own) // N) - len(owner.blocks)
        owner.blocks += [steps.free.pop() for _ in range(need)]
        steps.share(reader, owner, 2)
        steps.life._requests.get("a") and steps.life._requests["a"].blocks.extend(
            owner.blocks[len(steps.life._requests["a"].blocks) :]
        )
        steps.step((reader, 5), (owner, own))
        for _ in range(3):
            steps.step((reader, 1), (owner, 1))
        wanted = exact(reader.query, reader.key, reader.value, steps.scale)[2 * N : 2 * N + 8]
        torch.testing.assert_close(reader.output.double(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("wait", [0, 2])
@pytest.mark.parametrize("end", [N + 9, 2 * N - 1, 2 * N, 2 * N + 1])
def test_a_sessions_next_turn_goes_on_where_the_last_one_ended(end, wait, chooses):
    """Asynchronous scheduling has computed one token more, which may have filled a block."""
    steps = Steps(KERNELS, salient=N, chooses=chooses, scaled=False)
    session, other = steps.lossless("a", N + 8, 5 * N), steps.lossless("b", 3, 2 * N)
    steps.step((session, N + 8), (other, 3))
    while session.computed < end:
        steps.step((session, 1), (other, 1))
    kept = [x[end].clone() for x in (session.key, session.value)]
    session.key[end], session.value[end] = session.key[0], session.value[0]
    steps.step((session, 1))
    for _ in range(wait):
        steps.step((other, 1))
    session.key[end], session.value[end] = kept
    session.next_turn(end, end + N + 3)
    for count in (5, N - 2, 1, 1):
        steps.step((session, count), (other, 1))
    for x in (session, other):
        wanted = exact(x.query, x.key, x.value, steps.scale)[: x.computed]
        torch.testing.assert_close(x.output.double(), wanted, rtol=0, atol=4e-6)
    steps.step(finished=[session, other])
    assert_idle(steps)


@pytest.mark.parametrize("decode_score", ["last_query", "accumulate"])
@pytest.mark.parametrize("end", [N + 9, 2 * N - 1, 2 * N])
def test_sessions_give_their_rows_to_those_who_run_in_their_place(end, decode_score):
    """Two may run at a time; vLLM lets a third one in while the sessions' next turns wait."""
    together = Steps(KERNELS, rows=2, staged=12, decode_score=decode_score)
    sessions = [together.request(name, N + 8, 5 * N) for name in "ab"]
    others = [together.request(name, 3, 3 * N) for name in "cd"]
    alone, again = [], []
    for x in (*sessions, *others):
        alone.append(Steps(KERNELS, rows=1, staged=12, decode_score=decode_score))
        again.append(alone[-1].request(x.name, x.prompt, len(x.key)))
        again[-1].key, again[-1].value, again[-1].query = x.key, x.value, x.query

    def step(*work):
        together.step(*work)
        for x, count in work:
            at = (*sessions, *others).index(x)
            alone[at].step((again[at], count))

    step(*[(x, N + 8) for x in sessions])
    while sessions[0].computed < end:
        step(*[(x, 1) for x in sessions])
    step((others[0], 3), (sessions[1], 1))
    step(*[(x, 3 if x.computed == 0 else 1) for x in others])
    assert together.life.away == {"a", "b"}
    step(*[(x, 1) for x in others])
    for x in (sessions[0], again[0]):
        x.next_turn(end, end + N + 3)
    # One comes back in the place of the other one's successor, one never does.
    for count in (5, N - 2, 1, 1):
        step((sessions[0], count), (others[0], 1))
    assert together.life.away == {"b", "d"}
    together.step(finished=[sessions[1]])
    assert together.life.away == {"d"} == together.away._rows.keys()
    for _ in range(N):
        step(*[(x, 1) for x in others])
    for x, y in zip((*sessions, *others), again, strict=True):
        assert torch.equal(x.output, y.output)
    together.step(finished=[sessions[0], *others])
    assert_idle(together)
    assert not together.away._rows


def test_readers_of_a_block_do_not_change_its_scores():
    found = []
    for shared in (False, True):
        steps = Steps(KERNELS, seed=3)
        owner = steps.request("a", 4 * N, 5 * N)
        steps.step((owner, 2 * N))
        if shared:
            reader = steps.request("b", 2 * N + 5, 3 * N)
            steps.share(reader, owner, 2)
            steps.step((reader, 5))
            steps.step((reader, 1), (owner, 2 * N))
        else:
            steps.step((owner, 2 * N))
        steps.step((owner, 1))
        found.append(steps.memory.cache[owner.blocks[:4]])
    assert torch.equal(*found)


def schedule(seed):
    """Random steps: at each the requests that take part and how many tokens of their prompts."""
    rng = random.Random(seed)
    plan = {f"r{i}": (rng.randrange(1, 5 * N), rng.randrange(2, 2 * N)) for i in range(12)}
    return rng, plan


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("decode_score", ["last_query", "accumulate"])
@pytest.mark.parametrize("ends", [(2 * N + 9,), (3 * N - 1, 4 * N - 1), (3 * N, 3 * N + 4)])
def test_a_preempted_request_goes_on_as_a_new_one_whose_prompt_has_what_it_generated(
    ends, decode_score, v2
):
    """Also once more, and where the last token that it had computed has filled a block."""
    steps = Steps(KERNELS, decode_score=decode_score, v2=v2)
    request, other = steps.request("a", 2 * N + 3, 5 * N), steps.request("b", 3, 4 * N)
    for end in ends:
        while request.computed < end:
            steps.step((request, max(request.prompt - request.computed, 1)), (other, 1))
        steps.step((other, 1), preempted=[request])
        assert request.prompt == end + 1
    chunks = N + 1, request.prompt - N - 1
    alone = Steps(KERNELS, decode_score=decode_score)
    new = alone.request("a", request.prompt, 5 * N)
    new.key, new.value, new.query = request.key, request.value, request.query
    for count in (*chunks, *[1] * (5 * N - request.prompt)):
        steps.step((request, count), (other, 1))
        alone.step((new, count))
    assert torch.equal(request.output, new.output)
    assert states(steps, request) == states(alone, new)
    for mine, theirs in zip(request.blocks[:-1], new.blocks, strict=False):
        assert torch.equal(steps.memory.cache[mine], alone.memory.cache[theirs])
    steps.step(finished=[request, other])
    assert_idle(steps)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_with_preemption_read_nothing_stale(seed, chooses, v2):
    """A small pool of blocks, so that they pass from hand to hand; what is read is checked."""
    rng, plan = schedule(seed)
    steps = Steps(KERNELS, salient=N, chooses=chooses, scaled=False, blocks=26, rows=5, staged=12,
                  seed=seed, v2=v2)  # fmt: skip
    waiting = [steps.lossless(name, p, p + d) for name, (p, d) in plan.items()]
    running, finished, preempted, done, turns = [], [], [], 0, 0
    while waiting or running:
        work, budget = [], 4 * N
        for request in list(running):
            left = request.prompt - request.computed
            count = min(budget, rng.randrange(1, left + 1) if left > 0 else 1)
            need = -(-(request.computed + count) // N) - len(request.blocks)
            if rng.random() < 0.15 or count == 0:
                continue
            if need > len(steps.free) - sum(-(-n // N) + 1 for _, n in work):
                running.remove(request)
                preempted.append(request)
                waiting.insert(0, request)
                continue
            work.append((request, count))
            budget -= count
        while waiting and len(running) < 5 and not preempted and budget > 0:
            if len(steps.free) < 12:
                break
            request = waiting.pop(0)
            running.append(request)
            work.append((request, min(budget, request.prompt, N)))
            budget -= work[-1][1]
        steps.step(*work, finished=finished, preempted=preempted)
        finished, preempted = [], []
        for request in list(running):
            total = len(request.key)
            if request.computed >= total or rng.random() < 0.005:
                check = exact(request.query, request.key, request.value, steps.scale)
                torch.testing.assert_close(
                    request.output.double(), check[: request.computed], rtol=0, atol=4e-6
                )
                running.remove(request)
                finished.append(request)
                done += 1
        turns += 1
        assert turns < 3000
    steps.step(finished=finished)
    assert done == 12
    assert_idle(steps)


@pytest.mark.parametrize("seed", range(3))
def test_others_change_neither_outputs_nor_codes(seed):
    """Each request of a random schedule, alone: equal to the last bit."""
    rng, plan = schedule(seed)
    cuts = {name: [] for name in plan}
    steps = Steps(KERNELS, blocks=200, rows=12, staged=90, seed=seed, heads=8, kv_heads=2)
    requests = [steps.request(name, p, p + d) for name, (p, d) in plan.items()]
    while any(x.computed < len(x.key) for x in requests):
        work = []
        for x in requests:
            left = x.prompt - x.computed
            if x.computed < len(x.key) and rng.random() < 0.6:
                work.append((x, rng.randrange(1, left + 1) if left > 0 else 1))
                cuts[x.name].append(work[-1][1])
        if work:
            steps.step(*work)
    for x in requests:
        alone = Steps(KERNELS, blocks=20, rows=1, staged=12, heads=8, kv_heads=2)
        again = alone.request(x.name, x.prompt, len(x.key))
        again.key, again.value, again.query = x.key, x.value, x.query
        for n in cuts[x.name]:
            alone.step((again, n))
        assert torch.equal(again.output, x.output)
        size = steps.memory.page.size
        sealed = [i for i, s in enumerate(states(alone, again)) if s == "sealed"]
        for i in sealed:
            mine, theirs = (s.memory.cache[b.blocks[i]] for s, b in ((steps, x), (alone, again)))
            assert torch.equal(mine[:, :size], theirs[:, :size])
