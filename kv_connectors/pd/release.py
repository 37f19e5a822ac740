"""Ending a hand-over from outside the engines, as a router does when its client has gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.reference import Reference

CONNECT_TIMEOUT_S = 3.0
TIMEOUT_S = 5.0


def release(params: Mapping[str, Any], secret: bytes) -> None:
    """Free the blocks that a prefill instance's answer names.

    Args:
        params: The answer's ``kv_transfer_params``.
        secret: The secret that the instances share.

    Raises:
        BadReferenceError: They are malformed.
        WireError: A worker could not be told; its lease ends by itself.
    """
    reference = Reference.from_params(params)
    if reference is not None:
        connections = PeerConnections(secret, CONNECT_TIMEOUT_S, TIMEOUT_S)
        try:
            connections.release([reference])
        finally:
            connections.close()
