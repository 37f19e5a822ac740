"""A fleet of workers in virtual time, behind the library's own dispatch.

What is simulated is queueing: encoders, prefill and decode instances (or colocated ones) with step
times of a linear model, KV capacity, and the hand-over between them. A request with images goes to
prefill once all its images are encoded; encoding is not overlapped with prefill.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from math import inf, isnan

from vllm_plugins.errors import PluginError
from vllm_plugins.routing.dispatch import DISPATCHERS
from vllm_plugins.routing.instances import Capacity, Fleet, Instance, Role
from vllm_plugins.routing.ledger import Ledger, Ticket, Work
from vllm_plugins.routing.stage_servers import (
    Action,
    Clock,
    DecodeServer,
    EncodeServer,
    Engine,
    PrefillServer,
    Sequence,
)
from vllm_plugins.routing.stage_times import StageTimes

AT_DECODE, AT_PREFILL = "decode", "prefill"


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    Attributes:
        arrival_s: Seconds after the start.
        prompt_tokens: Length of the prompt, placeholders of images included.
        output_tokens: Length of the answer, at least 1.
        images: Encoder tokens of each image.

    Raises:
        ValueError: It arrives at no time, or a length is not positive.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    images: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < inf:
            raise ValueError(f"a request cannot arrive at {self.arrival_s} s")
        if min(self.prompt_tokens, self.output_tokens, *self.images) < 1:
            raise ValueError("a prompt, an answer and an image have at least one token")


@dataclass(frozen=True, slots=True)
class Shape:
    """How many workers do what; ``combined`` ones prefill and decode."""

    encode: int = 0
    prefill: int = 0
    decode: int = 0
    combined: int = 0

    @property
    def workers(self) -> int:
        """All of them."""
        return self.encode + self.prefill + self.decode + self.combined

    def __str__(self) -> str:
        if self.combined == self.workers:
            return "colocated"
        counts = {"E": self.encode, "P": self.prefill, "D": self.decode, "PD": self.combined}
        return " ".join(f"{number}{stage}" for stage, number in counts.items() if number)


@dataclass(slots=True)
class Outcome:
    """Times of one request, in seconds on the virtual clock.

    Attributes:
        arrival_s: When it arrived.
        output_tokens: Tokens it got.
        first_token_s: When it got the first one.
        end_s: When it got the last one.
    """

    arrival_s: float
    output_tokens: int
    first_token_s: float = float("nan")
    end_s: float = float("nan")

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token."""
        return (self.end_s - self.first_token_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True)
class Setup:
    """What serves a trace.

    Attributes:
        times: Of every worker.
        shape: How many workers do what.
        dispatch: Name of the dispatcher.
        first_token: ``decode`` where the decode instance computes the first token, as with vLLM's
            own connectors, or ``prefill`` where the prefill instance's is sent at once.
        prefill_slowdown: Factors on the times of the first prefill instances.
    """

    times: StageTimes
    shape: Shape
    dispatch: str = "backlog"
    first_token: str = AT_DECODE
    prefill_slowdown: tuple[float, ...] = ()


def simulate(requests: Items[Request], setup: Setup) -> list[Outcome]:
    """Serve a trace to its end.

    Returns:
        The requests' times, in their order.

    Raises:
        PluginError: A request is larger than a KV cache, or nobody serves one of its stages.
    """
    times = setup.times
    for request in requests:
        if times.blocks(request.prompt_tokens + request.output_tokens) > times.kv_blocks:
            raise PluginError(
                "trace",
                f"a request of {request.prompt_tokens + request.output_tokens} tokens does not fit "
                f"into {times.kv_blocks} KV blocks of {times.block_size} tokens",
                "raise kv_blocks in the file of --times or leave the request out",
            )
    flow = _Flow(requests, setup)
    flow.clock.run()
    return flow.outcomes


class _Flow:
    """The router of a simulation: sends each request from stage to stage."""

    def __init__(self, requests: Items[Request], setup: Setup) -> None:
        self.clock = Clock()
        self.outcomes = [Outcome(one.arrival_s, one.output_tokens) for one in requests]
        self.ledger = Ledger()
        self._setup = setup
        self._fleet = Fleet()
        self._encoders: dict[str, EncodeServer] = {}
        self._prefills: dict[str, PrefillServer] = {}
        self._decodes: dict[str, DecodeServer] = {}
        self._engines: dict[str, Engine] = {}
        self._decoding: dict[Sequence, Ticket] = {}
        self._build(setup)
        self._dispatcher = DISPATCHERS[setup.dispatch](self._fleet, self.ledger)
        # A router does not know how long an answer becomes; the mean stands for its experience.
        self._expected = round(sum(r.output_tokens for r in requests) / max(1, len(requests)))
        for request, outcome in zip(requests, self.outcomes, strict=True):
            self.clock.after(request.arrival_s, partial(_Journey(self, request, outcome).arrive))

    def _build(self, setup: Setup) -> None:
        shape, times = setup.shape, setup.times
        for i in range(shape.encode):
            self._encoders[self._add(f"E{i}", Role.ENCODE)] = EncodeServer(self.clock, times)
        for i in range(shape.prefill):
            slow = setup.prefill_slowdown[i] if i < len(setup.prefill_slowdown) else 1.0
            name = self._add(f"P{i}", Role.PREFILL)
            self._prefills[name] = PrefillServer(self.clock, times, slow)
        for i in range(shape.decode):
            self._decodes[self._add(f"D{i}", Role.DECODE)] = DecodeServer(self.clock, times)
        for i in range(shape.combined):
            self._engines[self._add(f"PD{i}", Role.PREFILL)] = Engine(self.clock, times)

    def _add(self, name: str, role: Role) -> str:
        times = self._setup.times
        # Full instances queue by themselves here, so that no promise is too large.
        capacity = Capacity(times.kv_blocks, times.block_size, kv_fraction=inf)
        self._fleet.add(Instance(name, f"virtual://{name}", role, capacity=capacity))
        return name

    def encode(self, images: Items[int], done: Action) -> bool:
        """Encode images on encoders, calling ``done`` after each; False where there are none."""
        if not self._encoders:
            return False
        chosen = self._dispatcher.spread(images, self.clock.now)
        for tokens, instance in zip(images, chosen or (), strict=True):
            ticket = self.ledger.open(instance, Work(encoder_tokens=tokens), self.clock.now)
            self._encoders[instance.id].submit(tokens, partial(self._encoded, ticket, done))
        return True

    def _encoded(self, ticket: Ticket, done: Action) -> None:
        ticket.close()
        done()

    def prefill(self, journey: _Journey) -> None:
        """Send a request to a prefill or a colocated instance."""
        request = journey.request
        ticket = self._ticket(Role.PREFILL, request)
        inline = 0 if self._encoders else sum(request.images)
        server = self._prefills.get(ticket.instance.id)
        if server:
            done = partial(self._prefilled, journey, ticket, server)
            server.submit(request.prompt_tokens, inline, done)
            return
        self._engines[ticket.instance.id].submit(
            Sequence(
                context=request.prompt_tokens,
                left=request.output_tokens,
                first_token=partial(self._computed, journey, ticket),
                finished=partial(self._finished, journey, ticket),
                todo=request.prompt_tokens,
                encoder_tokens=inline,
            )
        )

    def _prefilled(self, journey: _Journey, ticket: Ticket, server: PrefillServer) -> None:
        request = journey.request
        ticket.close()
        left = request.output_tokens
        if self._setup.first_token == AT_PREFILL:
            journey.first_token()
            left -= 1
        if not left:
            server.release(request.prompt_tokens)
            journey.end()
            return
        self._note_progress()
        ticket = self._ticket(Role.DECODE, request)
        sequence = Sequence(
            context=request.prompt_tokens,
            left=left,
            first_token=journey.first_token,
            finished=lambda: self._finished(journey, self._decoding.pop(sequence)),
        )
        self._decoding[sequence] = ticket
        self._decodes[ticket.instance.id].offer(
            sequence, partial(server.release, request.prompt_tokens)
        )

    def _note_progress(self) -> None:
        """Bring the tickets up to date before they are compared, as a stream of tokens does."""
        for server in self._decodes.values():
            for sequence, tokens in server.running():
                self._decoding[sequence].progress(tokens)

    def _computed(self, journey: _Journey, ticket: Ticket) -> None:
        ticket.progress(journey.request.prompt_tokens)
        journey.first_token()

    def _finished(self, journey: _Journey, ticket: Ticket) -> None:
        ticket.close()
        journey.end()

    def _ticket(self, role: Role, request: Request) -> Ticket:
        work = Work(request.prompt_tokens, self._expected)
        instance = self._dispatcher.choose(role, work, self.clock.now)
        if instance is None:
            raise PluginError(
                f"workers {self._setup.shape}", f"none of them can {role}", "add such workers"
            )
        return self.ledger.open(instance, work, self.clock.now)


class _Journey:
    """One request on its way."""

    def __init__(self, flow: _Flow, request: Request, outcome: Outcome) -> None:
        self.request = request
        self._flow = flow
        self._outcome = outcome
        self._images_left = len(request.images)

    def arrive(self) -> None:
        """Enter the first stage."""
        if not (self.request.images and self._flow.encode(self.request.images, self._image_done)):
            self._flow.prefill(self)

    def _image_done(self) -> None:
        self._images_left -= 1
        if not self._images_left:
            self._flow.prefill(self)

    def first_token(self) -> None:
        """Note the time of the first token, the first time."""
        if isnan(self._outcome.first_token_s):
            self._outcome.first_token_s = self._flow.clock.now

    def end(self) -> None:
        """Note the time of the last token."""
        self._outcome.end_s = self._flow.clock.now
