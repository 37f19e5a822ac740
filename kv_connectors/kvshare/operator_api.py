"""HTTP routes by which a server's operator looks at the store, fills and empties it.

An endpoint plug-in of vLLM, which loads it only where ``VLLM_PLUGINS`` names ``kvshare_operator``.
It reaches the engine as every endpoint does, by requests of one token; each carries a signed order
for the scheduler's side of the connector, whose answer comes back beside the output.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast
from uuid import uuid4

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.inputs.engine import tokens_input
from vllm.renderers.params import TokenizeParams
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_plugins.kv_connectors.kvshare.operator_desk import prompt_digest
from vllm_plugins.kv_connectors.kvshare.segments import as_tokens
from vllm_plugins.kv_connectors.kvshare.tenancy import OperatorOrders, canonical_salt, read_key
from vllm_plugins.settings import enabled_plugins

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

KEY_HEADER = "X-KVShare-Operator-Key"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DOMAIN = r"^[0-9a-f]{16}$"
# Longest wait for the engine; a registration queues and is computed like any prompt.
TIMEOUT_S = 120.0
# An order without a text needs some prompt; every vocabulary has this token.
NO_TEXT = (0,)

Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Token], Field(min_length=1)]


class Registration(BaseModel):
    """A text to be stored for all tenants.

    Attributes:
        name: By which it is shown and evicted.
        text: The text; or else
        token_ids: Its token ids.
        context: What the text is computed behind, without being stored itself. As text it follows
            the tokenizer's first token (BOS), where there is one; as token ids it is all there is.
            By default the first token alone.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=NAME)
    text: Text | None = None
    token_ids: TokenIds | None = None
    context: Text | list[Token] | None = None

    @model_validator(mode="after")
    def _one_text(self) -> Registration:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("give either text or token_ids")
        return self


@dataclass(frozen=True)
class Closed:
    """Why there is nobody to take orders; answers every request.

    Attributes:
        status: HTTP status.
        reason: For whoever asks.
    """

    status: int
    reason: str


class Office:
    """Takes the operator's orders to the engine's ranks and puts their answers together.

    Args:
        client: Reaches the server's engine.
        key: The operator's key.
    """

    def __init__(self, client: EngineClient, key: bytes) -> None:
        self._client = client
        self._key = hashlib.sha256(key).digest()
        self._orders = OperatorOrders(key)

    def admits(self, key: str) -> bool:
        """Whether a key is the operator's; takes as long for every wrong one."""
        return hmac.compare_digest(hashlib.sha256(key.encode()).digest(), self._key)

    async def inspect(self) -> dict[str, Any]:
        """Return what the ranks store, in all."""
        answers = await self._ask({"do": "inspect"})
        return {
            **_sums(answers, "capacity_tokens", "used_tokens", "segments"),
            "domains": _grouped(answers, "domains", "domain"),
            "canonical": _grouped(answers, "canonical", "name"),
        }

    async def evict(self, what: str, name: str = "") -> dict[str, Any]:
        """Evict from every rank that has it.

        Raises:
            HTTPException: No rank has it.
        """
        answers = await self._ask({"do": "evict", "what": what, "name": name})
        found = [answer for answer in answers if "error" not in answer]
        if not found:
            raise HTTPException(404, str(answers[0]["error"]))
        return _sums(found, "evicted_segments", "evicted_tokens")

    async def register(self, wanted: Registration) -> dict[str, Any]:
        """Have every rank compute and store a text.

        Returns:
            What each rank stored of it; the same in all.

        Raises:
            HTTPException: It does not fit the model, or not every rank has stored it.
        """
        context, text = await self._context(wanted), await self._tokens(wanted)
        prompt = [*context, *text]
        # One position is for the token that the request generates.
        most = self._client.model_config.max_model_len - 1
        if len(prompt) > most:
            reason = f"The text and its context are {len(prompt)} tokens; at most {most} fit."
            raise HTTPException(400, reason)
        digest = prompt_digest(as_tokens(prompt))
        order = {"do": "register", "name": wanted.name, "context": len(context), "prompt": digest}
        answers = await self._ask(order, prompt)
        refused = [(i, answer["error"]) for i, answer in enumerate(answers) if "error" in answer]
        if refused:
            rank, reason = refused[0]
            several = f" (rank {rank}; {len(refused)} of {len(answers)} ranks refuse)"
            raise HTTPException(409, f"{reason}{several if len(answers) > 1 else ''}")
        return {name: answers[0].get(name) for name in ("tokens", "segments")}

    async def _context(self, wanted: Registration) -> list[int]:
        if isinstance(wanted.context, list):
            return wanted.context
        bos = self._client.renderer.get_bos_token_id()
        first = [] if bos is None else [bos]
        return first if wanted.context is None else first + await self._encoded(wanted.context)

    async def _tokens(self, wanted: Registration) -> list[int]:
        if wanted.token_ids is not None:
            return wanted.token_ids
        assert wanted.text is not None
        return await self._encoded(wanted.text)

    async def _encoded(self, text: str) -> list[int]:
        """Tokenise as vLLM does a completion's prompt, its bound on the length included."""
        longest = self._client.model_config.max_model_len
        params = TokenizeParams(longest, max_output_tokens=1, add_special_tokens=False)
        prompt = await self._client.renderer.tokenize_prompt_async({"prompt": text}, params)
        return list(prompt["prompt_token_ids"])

    async def _ask(
        self, order: Mapping[str, object], prompt: Sequence[int] = NO_TEXT
    ) -> list[dict[str, Any]]:
        """Give an order to every rank.

        Args:
            order: What to do.
            prompt: Token ids of the request that carries it, shape (n,).

        Returns:
            An answer of each rank, in order.

        Raises:
            HTTPException: One of them has not answered in time, or not at all.
        """
        try:
            async with asyncio.timeout(TIMEOUT_S):
                asked = (self._ask_rank(order, prompt, rank) for rank in self._ranks())
                return await asyncio.gather(*asked)
        except TimeoutError:
            reason = f"The engine has not answered within {TIMEOUT_S:.0f} s."
            raise HTTPException(504, reason) from None

    async def _ask_rank(
        self, order: Mapping[str, object], prompt: Sequence[int], rank: int | None
    ) -> dict[str, Any]:
        salt = canonical_salt()
        # With the salt, so that an order that was seen, in a log, is of no use to a client, whose
        # salt the front door writes.
        signed = self._orders.sign({**order, "salt": salt})
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {"kvshare": {"operator": signed}}},
        )
        inputs = tokens_input(list(prompt), cache_salt=salt)
        request_id = f"kvshare-operator-{uuid4().hex}"
        told: Any = None
        async for output in self._client.generate(
            inputs, params, request_id, data_parallel_rank=rank
        ):
            told = output.kv_transfer_params
        return _answer(told)

    def _ranks(self) -> list[int | None]:
        """Return the data-parallel ranks that this server has; None is the only one there is."""
        parallel = self._client.vllm_config.parallel_config
        count = (
            parallel.data_parallel_size_local
            if parallel.local_engines_only
            else parallel.data_parallel_size
        )
        return [None] if count == 1 else list(range(count))


def _answer(told: Any) -> dict[str, Any]:
    """Return the scheduler's answer from what came beside an output."""
    told = told.get("kvshare") if isinstance(told, dict) else None
    answer = told.get("operator") if isinstance(told, dict) else None
    if not isinstance(answer, dict):
        reason = "The engine did not carry out the order; does it read the same operator_key_file?"
        raise HTTPException(502, reason)
    return answer


def _sums(answers: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    return {name: sum(int(answer.get(name, 0)) for answer in answers) for name in names}


def _grouped(answers: Sequence[Mapping[str, Any]], rows: str, key: str) -> list[dict[str, Any]]:
    """Return the rows of all answers, those of one key added up."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        for row in answer.get(rows, ()):
            groups.setdefault(row[key], []).append(row)
    return [
        {key: name, **_sums(group, "tokens", "segments", "hits")} for name, group in groups.items()
    ]


def _office(request: Request) -> Office:
    """Return whom to give orders to, once the request has proven to be the operator's."""
    office = request.app.state.kvshare_operator
    if isinstance(office, Closed):
        raise HTTPException(office.status, office.reason)
    assert isinstance(office, Office)
    if not office.admits(request.headers.get(KEY_HEADER, "")):
        raise HTTPException(401, f"The header {KEY_HEADER} does not hold the operator's key.")
    return office


Operators = Annotated[Office, Depends(_office)]

router = APIRouter(prefix="/v1/kvshare")


@router.get("/store")
async def inspect(office: Operators) -> dict[str, Any]:
    """Say what is stored."""
    return await office.inspect()


@router.post("/segments", dependencies=[Depends(validate_json_request)])
async def register(office: Operators, registration: Registration) -> dict[str, Any]:
    """Compute a text and store it for all tenants."""
    return await office.register(registration)


@router.delete("/segments/{name}")
async def evict_text(office: Operators, name: Annotated[str, Path(pattern=NAME)]) -> dict[str, Any]:
    """Forget a text that was registered."""
    return await office.evict("canonical", name)


@router.delete("/domains/{digest}")
async def evict_domain(
    office: Operators, digest: Annotated[str, Path(pattern=DOMAIN)]
) -> dict[str, Any]:
    """Forget what is stored of one domain."""
    return await office.evict("domain", digest)


@router.delete("/store")
async def evict_all(office: Operators) -> dict[str, Any]:
    """Forget everything."""
    return await office.evict("all")


class OperatorApi:
    """The endpoint plug-in, as vLLM's protocol ``EndpointPlugin`` wants it."""

    name = "kvshare_operator"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Find out whether there is anybody to take orders.

        Raises:
            PluginError: The operator's key cannot be read.
        """
        state.kvshare_operator = _opened(engine_client)


def _opened(client: EngineClient | None) -> Office | Closed:
    enabled = [] if client is None else enabled_plugins(client.vllm_config)
    for item in enabled:
        if item.plugin.name == "kvshare":
            path = cast("KVShareOptions", item.options).operator_key_file
            if path is None:
                return Closed(409, "--plugin kvshare has no operator_key_file, so no operator.")
            assert client is not None
            return Office(client, read_key("--plugin kvshare: operator_key_file", path))
    return Closed(404, "The server runs without --plugin kvshare.")
