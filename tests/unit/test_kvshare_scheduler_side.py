"""What the scheduler's part promises, refuses, counts and orders, with vLLM's own requests."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from tests.unit.kvshare_texts import random_text
from vllm_plugins.kv_connectors.kvshare import tally
from vllm_plugins.kv_connectors.kvshare.offers import LEAST_SAVING, EngineShape
from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions
from vllm_plugins.kv_connectors.kvshare.request_state import NO_HIT
from vllm_plugins.kv_connectors.kvshare.scheduler_side import SchedulerSide
from vllm_plugins.kv_connectors.kvshare.tally import WARM_UP
from vllm_plugins.kv_connectors.kvshare.transfer import Results

BLOCK, LAYERS = 16, 32


class Counts(Counter):
    """The metrics, of which only the counters are looked at."""

    def inc(self, name, amount=1, label=""):
        self[name, label] += amount

    def set(self, name, value):
        pass

    def refusals(self):
        name = "kvshare_refused_requests_total"
        return {label: n for (metric, label), n in self.items() if metric == name and n}


class Server:
    """The scheduler's part, and what vLLM's scheduler and the workers would say to it."""

    def __init__(self, max_runs=64, **options):
        self.counts = Counts()
        chosen = KVShareOptions(**{"fix_tokens_per_step": 256} | options)
        shape = EngineShape(BLOCK, LAYERS, max_runs)
        self.side = SchedulerSide(chosen, shape, 10**6, self.counts)
        # What the prefix cache holds approximately is the engine's tests' business.
        pool = SimpleNamespace(hash_block_size=BLOCK, num_gpu_blocks=1)
        self.side.bind(SimpleNamespace(get_block_ids=lambda name: ([3, 4, 5],), block_pool=pool))
        self.rng = np.random.default_rng(0)
        self.names = 0

    def text(self, length):
        return random_text(self.rng, length).tolist()

    def request(self, tokens, params=None, prompt_logprobs=None, **arguments):
        self.names += 1
        extra = None if params is None else {"kv_transfer_params": {"kvshare": params}}
        sampling = SamplingParams(max_tokens=99, extra_args=extra, prompt_logprobs=prompt_logprobs)
        return Request(f"r{self.names}", tokens, sampling, None, **arguments)

    def admit(self, request, computed=0):
        promised = self.side.promise(request, computed)
        self.side.admitted(request, promised)
        return promised

    def load(self, request, **results):
        """Let the workers say that they are through with it."""
        output = KVConnectorOutput(finished_recving={request.request_id})
        output.kv_connector_worker_meta = Results(**results)
        self.side.heard(output)

    def step(self, *requests):
        scheduled = {r.request_id: r.num_tokens - r.num_computed_tokens for r in requests}
        orders = self.side.orders(SimpleNamespace(num_scheduled_tokens=scheduled))
        for request in requests:
            request.num_computed_tokens = request.num_tokens
        return orders

    def serve(self, request, computed=0):
        """Answer a request, and return how much of its prompt was reused."""
        promised = self.admit(request, computed)
        if promised:
            self.load(request, recomputed={request.request_id: 0})
        self.step(request)
        self.side.ended(request)
        return promised


@pytest.fixture
def server():
    return Server()


def image(position, length):
    return MultiModalFeatureSpec(None, "image", "hash", PlaceholderRange(position, length))


def test_refusals_are_counted_by_reason(server):
    document = server.text(400)
    server.serve(server.request(document))
    assert server.counts.refusals() == {"unknown": 1}
    around = [*server.text(5), *document, 1, 2, 3]
    refused = {
        "short": server.request(around[:60]),
        "unknown": server.request(server.text(400)),
        "not_worth": server.request([*server.text(1500), *document[:100]]),
        "opted_out": server.request(around, {"reuse": False}),
        "full_prefill": server.request(around, prompt_logprobs=1),
        "media": server.request(around, mm_features=[image(40, 20)]),
    }
    for reason, request in refused.items():
        before = server.counts.refusals().get(reason, 0)
        assert server.serve(request) == 0
        assert server.counts.refusals()[reason] == before + 1
    assert server.counts["kvshare_requests_total", "blend"] == 0
    assert server.serve(server.request(around)) > 300
    assert server.counts["kvshare_requests_total", "blend"] == 1
    assert server.counts.refusals().keys() == refused.keys()


def test_what_the_prefix_cache_holds_leaves_little_to_reuse(server):
    document = server.text(400)
    server.serve(server.request(document))
    server.serve(server.request(document), computed=368)
    assert server.counts.refusals() == {"unknown": 1, "short": 1}


def test_a_long_text_before_an_image_that_the_prefix_cache_holds_is_not_the_images_fault(server):
    document = server.text(400)
    server.serve(server.request(document, mm_features=[image(390, 8)]), computed=368)
    assert server.counts.refusals() == {"short": 1}


def test_who_names_no_tenant_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("0" * 64)
    secret.chmod(0o600)
    server = Server(sharing_scope="tenant", tenant_secret_file=secret)
    document = server.text(400)
    for salt in (None, "made up"):
        assert server.serve(server.request(document, cache_salt=salt)) == 0
    assert server.counts.refusals() == {"unsigned": 2}
    assert len(server.side.index) == 0


def test_a_prompt_of_embeddings_is_left_alone(server):
    """Nothing names what its KV is of."""

    def embedded():
        return server.request(None, prompt_embeds=torch.zeros(400, 8))

    for _ in range(2):
        assert server.serve(embedded()) == 0
    assert len(server.side.index) == 0
    assert server.counts.refusals() == {"media": 2}
    assert server.side.hits([embedded()], 1000) == [NO_HIT]


def test_of_a_prompt_with_images_the_text_before_the_first_is_stored_and_reused(server):
    """Equal token ids stand for another image: they say nothing of the KV from there on."""
    document = server.text(600)
    features = [image(450, 20), image(300, 50)]
    server.serve(server.request(document, mm_features=features))
    assert 0 < server.side.index.used <= 300
    # A prompt without images, and one with others.
    for other in ([], [image(300, 50)], [image(310, 8)]):
        request = server.request([*server.text(5), *document], mm_features=other)
        # A block that a run ends in is computed to its end, if its tokens are text.
        first = other[0].mm_position.offset if other else 305 + BLOCK
        assert 200 < server.admit(request) <= first
        # All that was reused has been computed behind other text.
        assert (server.side._states[request.request_id].refreshed is None) == bool(other)
        server.load(request, recomputed={request.request_id: 0})
        server.side.ended(request)
    early = server.request(document, mm_features=[image(40, 20)])
    assert server.serve(early) == 0
    assert server.counts.refusals() == {"unknown": 1, "media": 1}
    [hit] = server.side.hits([server.request(document, mm_features=features)], 1000)
    assert 0.4 < hit.share <= 0.5


@pytest.mark.parametrize(("max_runs", "pays"), [(256, True), (4, False)])
def test_scattered_rows_that_take_many_passes_do_not_pay(max_runs, pays):
    server = Server(max_runs)
    document = server.text(600)
    server.serve(server.request(document))
    # A third of it is stored: 0.27 of the work is saved, and 30 rows in 8 passes cost as much.
    prompt = [*server.text(600), *document, *server.text(600)]
    promised = server.serve(server.request(prompt))
    assert (promised > 0) == pays
    assert server.counts.refusals() == {"unknown": 1} | ({} if pays else {"not_worth": 1})


@pytest.mark.parametrize("max_runs", [1, 4, 256])
def test_a_hit_saves_what_its_offer_saves(max_runs):
    server = Server(max_runs)
    document = server.text(600)
    server.serve(server.request(document))
    waiting = [server.request([*server.text(n), *document]) for n in (0, 40, 300, 1500, 9000)]
    hits = server.side.hits(waiting, 10**6)
    for request, hit in zip(waiting, hits, strict=True):
        assert hit.share == pytest.approx(600 / request.num_tokens)
        promised = server.side.promise(request, 0)
        if promised:
            assert LEAST_SAVING * (promised - BLOCK) < hit.saved <= promised + BLOCK
        else:
            assert hit.saved == 0
    assert hits[0].saved > 500
    assert hits[-1].saved == 0


def test_what_a_hit_saves_falls_with_the_passes_that_it_takes():
    saved = []
    for max_runs in (16, 64, 256):
        server = Server(max_runs)
        document = server.text(600)
        server.serve(server.request(document))
        (hit,) = server.side.hits([server.request([*server.text(40), *document])], 10**6)
        saved.append(hit.saved)
    assert saved == sorted(set(saved))
    # The first layer and a sixth of the rest are computed again all the same.
    assert saved[-1] < 0.8 * 600


@pytest.mark.parametrize(("selector", "pays"), [("dhd", False), ("none", True), ("epic", True)])
def test_rules_that_choose_few_runs_pay_in_small_passes(selector, pays):
    server = Server(2, selector=selector)
    document = server.text(600)
    server.serve(server.request(document))
    promised = server.serve(server.request([*server.text(40), *document]))
    assert (promised > 0) == pays


def test_a_request_is_counted_once_however_often_it_is_asked_about(server):
    request = server.request(server.text(400))
    for _ in range(3):
        server.side.promise(request, 0)
    assert server.counts.refusals() == {}
    server.admit(request)
    server.side.admitted(request, 0)
    request.num_preemptions = 1
    server.admit(request)
    assert server.counts.refusals() == {"unknown": 1}


def reusing(server):
    """A request that was promised reuse, and what it will have reused."""
    document = server.text(400)
    server.serve(server.request(document))
    request = server.request([*server.text(7), *document])
    assert server.admit(request) > 300
    return request


def test_reuse_is_counted_once_it_is_complete(server):
    request = reusing(server)
    reused = "kvshare_reused_tokens_total", "approximate"
    assert server.counts[reused] == server.counts["kvshare_requests_total", "blend"] == 0
    server.load(request, recomputed={request.request_id: 9})
    server.side.admitted(request, 0)
    assert server.counts[reused] > 300
    assert server.counts["kvshare_requests_total", "blend"] == 1
    assert server.counts["kvshare_recomputed_tokens_total", ""] == 9
    assert server.counts.refusals() == {"unknown": 1}


@pytest.mark.parametrize("brings_image", [False, True])
def test_a_session_that_brings_an_image_is_looked_at_no_more(server, brings_image):
    """Behind an image a query's index is not its position."""
    request = reusing(server)
    server.load(request, recomputed={request.request_id: 9})
    server.side.admitted(request, 0)
    server.step(request)
    if brings_image:
        request.mm_features.append(image(request.num_tokens, 8))
    request.append_output_token_ids(server.text(40))
    assert bool(server.step(request).refreshes) != brings_image


def test_what_fails_is_a_refusal_and_no_reuse(server):
    request = reusing(server)
    server.load(request, failed={request.request_id})
    # vLLM goes on where the failed blocks begin, or asks once more where that is at 0.
    server.side.admitted(request, server.side.promise(request, 0))
    server.side.admitted(request, 0)
    assert server.counts.refusals() == {"unknown": 1, "failed": 1}
    assert server.counts["kvshare_requests_total", "blend"] == 0


def test_what_is_aborted_meanwhile_is_no_reuse(server):
    request = reusing(server)
    request.status = RequestStatus.FINISHED_ABORTED
    server.side.ended(request)
    server.load(request)
    assert server.counts["kvshare_requests_total", "blend"] == 0
    assert server.counts["kvshare_reused_tokens_total", "approximate"] == 0
    assert not server.side._states


@pytest.fixture
def warnings(monkeypatch):
    """What is warned of."""
    said = []
    monkeypatch.setattr(tally.logger, "warning", lambda text, *values: said.append(text % values))
    return said


def test_no_reuse_after_a_warm_up_is_a_warning_with_the_likely_cause(server, warnings):
    for number in range(2 * WARM_UP + 9):
        # Every third one wants none, and is no sign of anything.
        out = {"reuse": False, "store": False} if number % 3 == 0 else None
        server.serve(server.request(server.text(40), out))
        asked = server.counts.refusals().get("short", 0)
        assert len(warnings) == (asked >= WARM_UP)
    [message] = warnings
    assert message == (
        "kvshare: none of the first 100 requests reused stored KV (short: 100); the likely cause: "
        "beyond the prefix cache's hit, prompts have less than min_reuse tokens"
    )


def test_where_anything_is_reused_there_is_no_warning(server, warnings):
    request = reusing(server)
    server.load(request, recomputed={request.request_id: 0})
    for _ in range(2 * WARM_UP):
        server.serve(server.request(server.text(40)))
    assert not warnings


def decoding(server, generated):
    request = reusing(server)
    server.load(request, recomputed={request.request_id: 0})
    server.step(request)
    request.append_output_token_ids(list(range(generated)))
    return request


def test_looks_of_a_step_are_bounded_and_who_waits_longest_goes_first():
    """256 tokens a step, of which half are for looks of up to 33: three of them."""
    server = Server()
    requests = [decoding(server, generated) for generated in (16, 19, 15, 18, 17)]

    def looked_at():
        return [order.request_id for order in server.step(*requests).refreshes]

    names = [request.request_id for request in requests]
    assert looked_at() == [names[1], names[3], names[4]]
    assert looked_at() == [names[0]]
    assert looked_at() == []
    requests[2].append_output_token_ids(7)
    [order] = server.step(*requests).refreshes
    assert (order.request_id, order.token_id) == (names[2], 14)
    assert order.position == requests[2].num_tokens - 2


def test_nobody_is_looked_at_who_has_nothing_left():
    server = Server()
    request = decoding(server, 16)
    assert server.step(request).refreshes
    output = KVConnectorOutput()
    output.kv_connector_worker_meta = Results(refreshed={request.request_id: 0})
    server.side.heard(output)
    request.append_output_token_ids([1] * 16)
    assert not server.step(request).refreshes


def test_look_ups_of_a_step_are_bounded_by_tokens(server, monkeypatch):
    document = server.text(400)
    server.serve(server.request(document))
    looked, plan = [], server.side._planner.plan

    def counted(domain, tokens, start, end):
        looked.append(len(tokens))
        return plan(domain, tokens, start, end)

    monkeypatch.setattr(server.side._planner, "plan", counted)
    waiting = [server.request([*document, number]) for number in range(5)]

    def shares():
        return [hit.share for hit in server.side.hits(waiting, 800)]

    assert shares() == pytest.approx([1, 1, 0, 0, 0], abs=0.01)
    shares()
    assert shares() == pytest.approx([1] * 5, abs=0.01)
    assert len(looked) == 5
    # The store changes: who was looked up longest ago is looked up again first.
    server.side.index.remove(next(iter(server.side.index)))
    looked.clear()
    server.side.hits(waiting, 1)
    assert len(looked) == 1
