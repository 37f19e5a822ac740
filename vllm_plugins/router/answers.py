"""Answers that the router itself gives: refusals and errors in OpenAI's form."""

from __future__ import annotations

import json
import math
from http import HTTPStatus


class RefusedError(Exception):
    """A request that the router answers itself, with an error.

    Args:
        status: HTTP status.
        message: What the client reads.
        outcome: Value of the label ``outcome`` of the metric that counts requests.
        retry_after_s: Seconds after which to ask again; 0 says nothing about it.
    """

    def __init__(
        self, status: int, message: str, outcome: str = "refused", retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.outcome = outcome
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer besides those that every answer has."""
        if not self.retry_after_s:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def error_body(status: int, message: str) -> bytes:
    """Return an error as OpenAI's API and vLLM's write it, as JSON."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json.dumps({"error": error}).encode()


def error_event(status: int, message: str) -> bytes:
    """Return an error as the last event of a stream that has begun already."""
    return b"data: " + error_body(status, message) + b"\n\ndata: [DONE]\n\n"
