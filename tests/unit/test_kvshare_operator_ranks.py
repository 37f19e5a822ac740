"""The operator's endpoints before several ranks, and before engines that fail."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from tests.unit.kvshare_operator import (
    EMPTY,
    EVICTED,
    REGISTERED,
    SEGMENTS,
    STORE,
    FakeEngine,
    Servers,
    error_of,
)
from vllm_plugins.kv_connectors.kvshare import operator_api


@pytest.fixture
def serve(tmp_path, monkeypatch):
    return Servers(tmp_path, monkeypatch)


# --- several ranks ---


def row(key, name, tokens, segments, hits):
    return {key: name, "tokens": tokens, "segments": segments, "hits": hits}


class Ranks(FakeEngine):
    """Each rank with an answer of its own."""

    def __init__(self, *answers, **kwargs):
        super().__init__(len(answers), **kwargs)
        self.answers = answers

    def reply(self, order, rank):
        return self.answers[rank or 0]


def test_what_several_ranks_store_is_added_up_by_domain_and_name(serve):
    engine = Ranks(
        {
            "capacity_tokens": 100,
            "used_tokens": 30,
            "segments": 3,
            "domains": [row("domain", "aa", 20, 2, 1), row("domain", "bb", 10, 1, 0)],
            "canonical": [row("name", "manual", 5, 1, 7)],
        },
        {
            "capacity_tokens": 100,
            "used_tokens": 7,
            "segments": 1,
            "domains": [row("domain", "bb", 7, 1, 4)],
            "canonical": [row("name", "manual", 5, 1, 1)],
        },
    )
    assert serve(engine).get(STORE).json() == {
        "capacity_tokens": 200,
        "used_tokens": 37,
        "segments": 4,
        "domains": [row("domain", "aa", 20, 2, 1), row("domain", "bb", 17, 2, 4)],
        "canonical": [row("name", "manual", 10, 2, 8)],
    }
    assert sorted(sent.rank for sent in engine.seen) == [0, 1]


def test_every_rank_registers_and_one_answer_says_what(serve):
    engine = Ranks(REGISTERED, REGISTERED, REGISTERED)
    said = serve(engine).post(SEGMENTS, json={"name": "n", "text": "t5"})
    assert said.json() == REGISTERED
    assert sorted(sent.rank for sent in engine.seen) == [0, 1, 2]


def test_a_registration_that_one_rank_refuses_says_so(serve):
    engine = Ranks(REGISTERED, {"error": "no room"})
    message = error_of(serve(engine).post(SEGMENTS, json={"name": "n", "text": "t5"}), 409)
    assert message == "no room (rank 1; 1 of 2 ranks refuse)"


def test_a_refusal_by_the_only_rank_is_passed_on_as_it_is(serve):
    engine = Ranks({"error": "no room"})
    message = error_of(serve(engine).post(SEGMENTS, json={"name": "n", "text": "t5"}), 409)
    assert message == "no room"


def test_what_only_some_ranks_have_is_evicted_from_those(serve):
    engine = Ranks({"error": "nothing is named so"}, EVICTED, EVICTED)
    said = serve(engine).delete(f"{SEGMENTS}/manual")
    assert said.json() == {"evicted_segments": 4, "evicted_tokens": 60}
    nowhere = Ranks({"error": "nothing is named so"}, {"error": "nothing is named so"})
    assert error_of(serve(nowhere).delete(f"{SEGMENTS}/manual"), 404) == "nothing is named so"


def test_behind_another_load_balancer_only_the_servers_own_ranks_are_asked(serve):
    engine = FakeEngine(ranks=8, local_ranks=2)
    assert serve(engine).get(STORE).json()["capacity_tokens"] == 18
    assert sorted(sent.rank for sent in engine.seen) == [0, 1]
    alone = FakeEngine(ranks=8, local_ranks=1)
    assert serve(alone).get(STORE).json()["capacity_tokens"] == 9
    assert [sent.rank for sent in alone.seen] == [None]


# --- an engine that does not do as it is told ---


@pytest.mark.parametrize(
    "told",
    [None, {}, "text", {"kvshare": None}, {"kvshare": "x"}, {"kvshare": {"operator": None}},
     {"kvshare": {"operator": ["x"]}}, {"other": {"operator": {}}}],
)  # fmt: skip
def test_an_output_without_an_answer_is_said_to_be_one(serve, told):
    class Silent(FakeEngine):
        async def generate(self, *args, **kwargs):
            yield SimpleNamespace(kv_transfer_params=told)

    message = error_of(serve(Silent()).get(STORE), 502)
    assert message.startswith("The engine did not carry out the order")


def test_an_engine_that_does_not_answer_in_time_is_given_up(serve, monkeypatch):
    given_up = []

    class Hung(FakeEngine):
        hung = True

        async def generate(self, *args, **kwargs):
            try:
                if self.hung:
                    await asyncio.Event().wait()
                yield SimpleNamespace(kv_transfer_params={"kvshare": {"operator": EMPTY}})
            except asyncio.CancelledError:
                given_up.append(True)
                raise

    monkeypatch.setattr(operator_api, "TIMEOUT_S", 0.05)
    engine = Hung(ranks=2)
    client = serve(engine)
    assert error_of(client.get(STORE), 504) == "The engine has not answered within 0 s."
    assert given_up == [True, True]
    engine.hung = False
    assert client.get(STORE).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VLLMValidationError("token 99 is out of vocabulary"), 400),
        (RuntimeError("it broke"), 500),
        (KeyError("x"), 500),
    ],
)
def test_an_error_of_the_engine_is_an_answer_and_the_server_goes_on(serve, error, status):
    class Broken(FakeEngine):
        broken = True

        def reply(self, order, rank):
            if self.broken:
                raise error
            return EMPTY

    engine = Broken()
    client = serve(engine)
    error_of(client.get(STORE), status)
    engine.broken = False
    assert client.get(STORE).status_code == 200
