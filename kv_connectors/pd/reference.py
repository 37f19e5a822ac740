"""What names a prompt's KV between servers, so that no stale reference delivers another's.

A prefill instance answers a request with a *reference*: which transfer, of which run of which
workers, over which tokens. It names no block: the prefill worker looks its own blocks up, and only
where transfer, generation and digest all agree. A reference is JSON from a peer or from a client,
so it is checked as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from vllm_plugins.wire.address import Address
from vllm_plugins.wire.errors import WireError

KEY = "vllm_plugins_pd"
VERSION = 1

DIGEST_BYTES = 16
MAX_PEERS = 1024
MAX_TOKENS = 1 << 26

_TRANSFER_ID = re.compile(r"[A-Za-z0-9._:\-]{1,256}")
_GENERATION = re.compile(r"[0-9a-f]{16}")
_DIGEST = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")


class BadReferenceError(ValueError):
    """A reference is malformed, or names other tokens than the request's."""


@dataclass(frozen=True)
class Peer:
    """One worker of a prefill instance.

    Attributes:
        address: Where it listens.
        generation: 64 random bits of its present run, in hexadecimal.
    """

    address: Address
    generation: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"address": self.address.to_json(), "generation": self.generation}

    @classmethod
    def from_json(cls, value: Any) -> Peer:
        """Return the peer of a JSON value.

        Raises:
            BadReferenceError: It is not one.
        """
        if not isinstance(value, dict):
            raise BadReferenceError("a peer is no JSON object")
        try:
            address = Address.from_json(value.get("address"))
        except WireError as error:
            raise BadReferenceError(f"a peer's address: {error}") from None
        return cls(address, _text(value, "generation", _GENERATION))


@dataclass(frozen=True)
class Reference:
    """Names the KV of one prompt on a prefill instance.

    Attributes:
        transfer_id: Of the hand-over; the router may have chosen it.
        num_tokens: Prompt tokens whose KV there is; None while they are being computed, which
            means all of the request's prompt.
        digest: `prompt_digest` of them in hexadecimal; None like `num_tokens`.
        peers: The workers, in order of pipeline rank, then tensor rank.
    """

    transfer_id: str
    num_tokens: int | None
    digest: str | None
    peers: tuple[Peer, ...]

    @property
    def streams(self) -> bool:
        """Whether the KV is still being computed, and comes layer by layer."""
        return self.num_tokens is None

    def to_params(self) -> dict[str, Any]:
        """Return what a prefill instance answers, and a decode request carries, in JSON form."""
        body = {
            "version": VERSION,
            "transfer_id": self.transfer_id,
            "num_tokens": self.num_tokens,
            "digest": self.digest,
            "peers": [peer.to_json() for peer in self.peers],
        }
        return {"do_remote_prefill": True, "do_remote_decode": False, KEY: body}

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Reference | None:
        """Return the reference in a request's ``kv_transfer_params``; None where there is none.

        Raises:
            BadReferenceError: There is one, and it is malformed.
        """
        if not params:
            return None
        if not isinstance(params, Mapping):
            raise BadReferenceError("kv_transfer_params is no JSON object")
        if not params.get("do_remote_prefill"):
            return None
        body = params.get(KEY)
        if not isinstance(body, dict):
            raise BadReferenceError(f"kv_transfer_params has no '{KEY}': not from this connector")
        version = body.get("version")
        if type(version) is not int or version != VERSION:
            raise BadReferenceError(f"version {version!r:.20}, here {VERSION}")
        streams = body.get("num_tokens") is None and body.get("digest") is None
        return cls(
            transfer_id(body),
            None if streams else _token_count(body.get("num_tokens")),
            None if streams else _text(body, "digest", _DIGEST),
            _peers(body.get("peers")),
        )

    def check(self, tokens: Sequence[int], extra: Iterable[Any]) -> int:
        """Return how many of a request's tokens the reference covers.

        Args:
            tokens: The request's prompt.
            extra: What else its KV depends on (see `prompt_digest`).

        Raises:
            BadReferenceError: The reference is to another prompt.
        """
        if self.num_tokens is None:
            return len(tokens)
        if self.num_tokens > len(tokens):
            raise BadReferenceError(f"{self.num_tokens} tokens, and the prompt has {len(tokens)}")
        if prompt_digest(tokens[: self.num_tokens], extra) != self.digest:
            raise BadReferenceError("the prompt's tokens are others than those that were computed")
        return self.num_tokens


def transfer_id(body: Mapping[str, Any]) -> str:
    """Return the validated ``transfer_id`` of a JSON object.

    Raises:
        BadReferenceError: It is missing or malformed.
    """
    return _text(body, "transfer_id", _TRANSFER_ID)


def prompt_digest(tokens: Sequence[int], extra: Iterable[Any] = ()) -> str:
    """Return the digest of a prompt, in hexadecimal.

    Args:
        tokens: Token ids.
        extra: What else the KV depends on: adapter, cache salt, identity of media.
    """
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"vllm-plugins-pd")
    # Lengths come first, so that no token can be taken for a part of the rest.
    digest.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, np.int64).tobytes())
    for item in extra:
        text = repr(item).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _text(body: Mapping[str, Any], name: str, form: re.Pattern[str]) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not form.fullmatch(value):
        raise BadReferenceError(f"{name} is missing or malformed")
    return value


def _token_count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_TOKENS:
        raise BadReferenceError("num_tokens is no count of tokens")
    return value


def _peers(value: Any) -> tuple[Peer, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PEERS:
        raise BadReferenceError("peers is no list of workers")
    return tuple(map(Peer.from_json, value))
