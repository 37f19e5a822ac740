"""Tenant domains on the real engine: what crosses their borders, what an operator may do."""

import secrets
import time

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engine.kvshare_engine import (
    DOCS,
    PROMPTS,
    Served,
    assert_stock,
    documents,
    prompt,
    served,
    tokens_of,
)
from vllm_plugins.kv_connectors.kvshare.operator_desk import prompt_digest
from vllm_plugins.kv_connectors.kvshare.segments import as_tokens
from vllm_plugins.kv_connectors.kvshare.tenancy import (
    OperatorOrders,
    TenantSalts,
    canonical_salt,
)

pytestmark = pytest.mark.engine

SECRET, KEY = secrets.token_bytes(32).hex(), secrets.token_bytes(32).hex()
SALTS, ORDERS = TenantSalts(SECRET.encode()), OperatorOrders(KEY.encode())
ALICE, BOB = SALTS.salt("alice", None), SALTS.salt("bob", None)
# Stands in front of the text it is planted before; fixed, so that every run plants the same.
PLANTED = documents(1, length=96, seed=99)[0]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, text in (("tenants", SECRET), ("operator", KEY)):
        (folder / name).write_text(text + "\n")
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def shared(stock, keys):
    """An engine whose tenants share what the operator registers, and nothing is recomputed."""
    spec = (
        f"kvshare:sharing_scope=public_canonical,tenant_secret_file={keys}/tenants,"
        f"operator_key_file={keys}/operator,selector=none,decode_interval=0"
    )
    with served(spec) as engine:
        yield engine


def cached(output) -> int:
    return output.num_cached_tokens


def operate(engine: Served, prompt_ids=(1,), salt=None, **order):
    """Send an order the way the endpoint does, and return its answer."""
    salt = salt or canonical_salt()
    return send(engine, ORDERS.sign({**order, "salt": salt}), prompt_ids, salt)


def send(engine: Served, signed, prompt_ids, salt):
    extra = {"kv_transfer_params": {"kvshare": {"operator": signed}}}
    [output] = engine.greedy([list(prompt_ids)], salt=salt, tokens=1, extra=extra)
    params = output.kv_transfer_params
    return params and params["kvshare"]["operator"]


def register(engine: Served, name, text, context=(1,)):
    prompt_ids = [*context, *text]
    order = {"do": "register", "name": name, "context": len(context)}
    return operate(engine, prompt_ids, prompt=prompt_digest(as_tokens(prompt_ids)), **order)


# --- Quotas; first, since only one engine may be up in a process ---


def test_filling_the_store_does_not_tell_what_another_tenant_has_stored(keys, stock):
    """A prober within its quota keeps its own text whatever an active neighbour stores."""
    spec = (
        f"kvshare:sharing_scope=tenant,tenant_secret_file={keys}/tenants,host_gib=0.005,"
        "min_reuse=64"
    )
    with served(spec) as engine:
        quota = engine.side.index.quota
        mine = documents(1, length=min(200, quota // 2), seed=3)[0]
        engine.greedy([[5, *mine]], salt=BOB)
        for number in range(3 * engine.side.index.capacity // 400):
            engine.greedy([documents(1, length=400, seed=50 + number)[0]], salt=ALICE, tokens=1)
        assert cached(engine.greedy([[9, 9, *mine]], salt=BOB)[0]) > 0
        engine.assert_idle()


# --- Borders ---


def test_the_same_text_of_another_tenant_is_not_reused(shared, stock):
    shared.forget()
    shared.greedy([prompt(0, 1, 2)], salt=ALICE)
    [bobs] = shared.greedy([PROMPTS[1]], salt=BOB)
    assert cached(bobs) == 0
    assert_stock([bobs], stock[1:2])
    [alices] = shared.greedy([PROMPTS[1]], salt=ALICE)
    assert cached(alices) > 0.8 * len(PROMPTS[1])
    shared.assert_idle()


@pytest.mark.parametrize("salt", [None, "alice", "kvshare.t.00.00", ALICE[:-1], ALICE + "0"])
def test_a_salt_that_the_front_door_has_not_signed_shares_with_nobody(shared, stock, salt):
    shared.forget()
    before = len(shared.side.index)
    for _ in range(2):
        # Without the prefix cache, which is vLLM's own and shares within a salt.
        outputs = shared.greedy([PROMPTS[0]], salt=salt)
        assert shared.llm.reset_prefix_cache()
    assert cached(outputs[0]) == 0
    assert_stock(outputs, stock[:1])
    assert len(shared.side.index) == before


def test_a_clients_own_salt_narrows_its_tenants_domain(shared):
    shared.forget()
    narrow = SALTS.salt("alice", "project x")
    shared.greedy([prompt(0, 1, 2)], salt=ALICE)
    assert cached(shared.greedy([PROMPTS[1]], salt=narrow)[0]) == 0
    assert cached(shared.greedy([prompt(1, 0, 2)], salt=narrow)[0]) > 0


def _planted_answers(engine: Served, attacker: str, victim: str):
    """Return what a victim is answered after somebody has put a prefix before its documents."""
    engine.forget()
    engine.greedy([[*PLANTED, *prompt(0, 1, 2)]], salt=attacker)
    return engine.greedy([PROMPTS[1]], salt=victim, tokens=24)


def test_a_planted_prefix_stays_in_its_domain(shared, stock):
    """Nothing is recomputed here, so inside a domain the planted text shows; outside it does not.

    Cache hijacking (arXiv 2607.19957): who gets their text stored behind an adversarial prefix
    changes the answers of everybody who reuses it.
    """
    [outside] = _planted_answers(shared, ALICE, BOB)
    assert cached(outside) == 0
    assert tokens_of([outside]) == [stock[1][:24]]
    [inside] = _planted_answers(shared, ALICE, ALICE)
    assert cached(inside) > 0.8 * len(PROMPTS[1])
    assert tokens_of([inside]) != [stock[1][:24]]


# --- Time ---


def area_under_curve(negative, positive) -> float:
    """Return the probability that a positive's value is below a negative's; ties count half."""
    negative, positive = np.asarray(negative)[:, None], np.asarray(positive)[None, :]
    return float(((positive < negative) + 0.5 * (positive == negative)).mean())


def probe(engine: Served, text, salt):
    """Return what a client sees of one request: seconds to the first token, and cached tokens."""
    begin = time.perf_counter()
    [output] = engine.greedy([text], salt=salt, tokens=1)
    return time.perf_counter() - begin, cached(output)


def probe_all(engine: Served, rounds, victim, prober):
    """Probe texts of which a victim has stored half, in random order."""
    rng = np.random.default_rng(5)
    seen = {False: [], True: []}
    for number in range(rounds):
        # Of exactly the same length, which shows in the time far more than anything else.
        known, unknown = (documents(1, length=200, seed=2 * number + i)[0] for i in (500, 501))
        engine.greedy([[7, *known]], salt=victim, tokens=1)
        for stored in rng.permutation([False, True]):
            text = [11, 13, *(known if stored else unknown)]
            seen[bool(stored)].append(probe(engine, text, prober))
    return seen


def times(seen):
    return [seconds for seconds, _ in seen]


def test_time_and_usage_do_not_tell_what_another_tenant_has_stored(shared):
    shared.forget()
    # 900 of each kind: the area's own scatter is 0.014, so chance passes 0.55 once in 5,000 runs.
    seen = probe_all(shared, 900, victim=ALICE, prober=BOB)
    assert {tokens for kind in seen.values() for _, tokens in kind} == {0}
    area = area_under_curve(times(seen[False]), times(seen[True]))
    assert 0.45 <= area <= 0.55
    # The same eyes do see what is stored in their own domain.
    shared.forget()
    own = probe_all(shared, 40, victim=BOB, prober=BOB)
    # On a model this small, putting KV together takes longer than computing it.
    assert abs(area_under_curve(times(own[False]), times(own[True])) - 0.5) > 0.15
    assert min(tokens for _, tokens in own[True]) > 0


# --- The operator ---


def test_a_canonical_text_serves_every_tenant(shared):
    shared.forget()
    answer = register(shared, "handbook", DOCS[0])
    assert answer == {"tokens": len(DOCS[0]), "segments": answer["segments"]}
    for salt in (ALICE, BOB):
        # Within the first tokens a canonical text may be exact; this is another context.
        [output] = shared.greedy([[3, 4, *DOCS[0], 7, 8, 9]], salt=salt)
        assert cached(output) > 0.8 * len(DOCS[0])
    [listed] = operate(shared, do="inspect")["canonical"]
    assert listed["name"] == "handbook"
    assert listed["hits"] >= 2
    # Salts that were not signed get nothing of it either.
    assert cached(shared.greedy([[3, 4, *DOCS[0], 7, 8, 9]], salt="mallory")[0]) == 0
    assert "evicted_tokens" in operate(shared, do="evict", what="canonical", name="handbook")
    shared.step_once()
    assert not operate(shared, do="inspect")["canonical"]


def test_a_users_text_never_becomes_canonical(shared):
    shared.forget()
    register(shared, "handbook", DOCS[0])
    shared.greedy([[*PLANTED, *DOCS[0], *DOCS[1]]], salt=ALICE)
    public = shared.side._domains.public
    segments = [shared.side.index.get(key) for key in shared.side.index]
    canonical = [s for s in segments if s.domain == public]
    assert sum(map(len, canonical)) == len(DOCS[0])
    assert all(s.generation == 0 and s.position >= 1 for s in canonical)
    assert cached(shared.greedy([[3, *DOCS[1], 7]], salt=BOB)[0]) == 0
    operate(shared, do="evict", what="all")
    shared.step_once()
    assert not len(shared.side.index)


def test_canonical_kv_is_that_of_its_fixed_context(shared):
    """Bit for bit what a second registration of the same text computes, whoever came between."""
    shared.forget()

    def stored():
        public = shared.side._domains.public
        keys = [k for k in shared.side.index if shared.side.index.get(k).domain == public]
        return [shared.worker.kitchen.payloads._stored[key].clone() for key in keys]

    register(shared, "first", DOCS[2])
    before = stored()
    shared.greedy([[*PLANTED, *DOCS[2]]], salt=ALICE)
    operate(shared, do="evict", what="canonical", name="first")
    register(shared, "second", DOCS[2])
    after = stored()
    assert len(before) == len(after) > 0
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    operate(shared, do="evict", what="canonical", name="second")


def test_a_name_can_be_registered_once_and_a_text_without_room_leaves_nothing(shared):
    shared.forget()
    register(shared, "handbook", DOCS[0])
    assert "already" in register(shared, "handbook", DOCS[1])["error"]
    shared.side.index.capacity, kept = shared.side.index.used + 8, shared.side.index.capacity
    try:
        assert "error" in register(shared, "other", DOCS[1])
    finally:
        shared.side.index.capacity = kept
    assert [c["name"] for c in operate(shared, do="inspect")["canonical"]] == ["handbook"]
    operate(shared, do="evict", what="canonical", name="handbook")
    shared.assert_idle()


def test_two_registrations_of_one_name_in_flight_leave_one_text(shared):
    shared.forget()
    from vllm import SamplingParams

    for text in (DOCS[0], DOCS[1]):
        prompt_ids, salt = [1, *text], canonical_salt()
        order = {
            "do": "register",
            "name": "twice",
            "context": 1,
            "prompt": prompt_digest(as_tokens(prompt_ids)),
            "salt": salt,
        }
        params = {"kvshare": {"operator": ORDERS.sign(order)}}
        settings = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        shared.ids += 1
        inputs = {"prompt_token_ids": prompt_ids, "cache_salt": salt}
        shared.engine.add_request(f"r{shared.ids}", inputs, settings)
    answers = []
    while shared.engine.has_unfinished_requests():
        done = [output for output in shared.engine.step() if output.finished]
        answers += [output.kv_transfer_params["kvshare"]["operator"] for output in done]
    assert sorted("error" in answer for answer in answers) == [False, True]
    [row] = operate(shared, do="inspect")["canonical"]
    assert row["name"] == "twice"
    shared.side._chains._roots[b"of a prompt that was blended"] = None
    assert operate(shared, do="evict", what="all")["evicted_tokens"] == row["tokens"]
    assert not shared.side._chains._roots
    shared.step_once()
    assert not len(shared.side.index)
    shared.assert_idle()


def test_orders_that_the_operator_has_not_signed_do_nothing(shared):
    shared.forget()
    shared.greedy([prompt(0, 1, 2)], salt=ALICE)
    held = len(shared.side.index)
    everything = {"do": "evict", "what": "all", "name": "", "salt": BOB}
    genuine = ORDERS.sign(everything)
    forged = OperatorOrders(b"x" * 32).sign(everything)
    # One that was seen in a log, of another request.
    seen = ORDERS.sign(everything | {"salt": canonical_salt()})
    for order in (
        None,
        [],
        "evict",
        {},
        {"do": "evict", "what": "all"},
        forged,
        seen,
        genuine | {"what": "domain"},
        genuine | {"mac": None},
    ):
        assert send(shared, order, [1], BOB) is None
    # A registration is bound to its own prompt.
    order = {"do": "register", "name": "x", "context": 1, "prompt": "00"}
    assert operate(shared, [1, *DOCS[3]], **order) is None
    assert len(shared.side.index) == held
    assert not operate(shared, do="inspect")["canonical"]


def test_an_operator_sees_domains_by_digest_and_evicts_one(shared):
    shared.forget()
    shared.greedy([prompt(0, 1)], salt=ALICE)
    shared.greedy([prompt(2, 3)], salt=BOB)
    seen = operate(shared, do="inspect")
    assert seen["used_tokens"] == sum(d["tokens"] for d in seen["domains"])
    assert len(seen["domains"]) == 2
    victim = shared.side._domains.of(ALICE).hex()[:16]
    done = operate(shared, do="evict", what="domain", name=victim)
    assert done["evicted_segments"] > 0
    [left] = operate(shared, do="inspect")["domains"]
    assert left["domain"] != victim
    assert "error" in operate(shared, do="evict", what="domain", name="f" * 16)
    assert "error" in operate(shared, do="evict", what="canonical", name="nothing")
    shared.assert_idle()
