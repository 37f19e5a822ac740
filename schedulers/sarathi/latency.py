"""Who is due when: arrival, last token and targets of every request in the engine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_plugins.schedulers.sarathi.targets import (
    NO_TARGETS,
    InvalidTargetError,
    Targets,
    request_targets,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.vllm_plugins.sarathi")


@dataclass
class _Session:
    """A request to which turns are added under its name.

    Attributes:
        request: vLLM's own, which is given the parameters of each turn that begins.
        params: Of the turn under way.
        turns: Parameters of those that have not begun, when they arrived and their targets.
    """

    request: Request
    params: Any
    turns: deque[tuple[Any, float, Targets]] = field(default_factory=deque)


class LatencyLedger:
    """Times on the scheduler's clock, in seconds.

    Args:
        default: Targets of a request that brings none of its own.
    """

    def __init__(self, default: Targets) -> None:
        self._default = default
        self._arrived: dict[str, float] = {}
        self._last_token: dict[str, float] = {}
        # Only requests with targets of their own, so that the usual look-up is a miss.
        self._own: dict[str, Targets] = {}
        self._sessions: dict[str, _Session] = {}

    def add(self, request: Request, arrived: float) -> bool:
        """Take a new request, or a further turn of one that is a session.

        Returns:
            False if its own targets are malformed and were ignored.
        """
        targets, valid = NO_TARGETS, True
        try:
            targets = request_targets(request)
        except InvalidTargetError as error:
            logger.warning("vllm-plugins: sarathi: request %s: %s", request.request_id, error)
            valid = False
        session = self._sessions.get(request.request_id)
        if session is not None:
            session.turns.append((request.sampling_params, arrived, targets))
            return valid
        if request.resumable:
            self._sessions[request.request_id] = _Session(request, request.sampling_params)
        self._start(request.request_id, arrived, targets)
        return valid

    def _start(self, request_id: str, arrived: float, targets: Targets) -> None:
        self._arrived[request_id] = arrived
        self._last_token.pop(request_id, None)
        self._own.pop(request_id, None)
        if targets is not NO_TARGETS:
            self._own[request_id] = Targets(
                targets.ttft or self._default.ttft, targets.tbt or self._default.tbt
            )

    def follow_sessions(self) -> None:
        """Begin the turns that vLLM has begun since the last step: each has a first token anew."""
        for name, session in self._sessions.items():
            while session.turns and session.request.sampling_params is not session.params:
                session.params, arrived, targets = session.turns.popleft()
                self._start(name, arrived, targets)

    def targets(self, request_id: str) -> Targets:
        """Return a request's targets, its own or the default."""
        return self._own.get(request_id, self._default)

    def arrived(self, request_id: str) -> float:
        """Return when a request arrived."""
        return self._arrived[request_id]

    def tightest_tbt(self, decodes: Iterable[Request]) -> float | None:
        """Return the smallest TBT target among decodes; None where none has one."""
        if not self._own:
            return self._default.tbt
        tbts = (self.targets(request.request_id).tbt for request in decodes)
        return min((tbt for tbt in tbts if tbt is not None), default=None)

    def least_slack(self, decodes: Iterable[Request], now: float) -> float | None:
        """Return the time left until the first decode's next token is due."""
        due = (
            self._last_token.get(request.request_id, now) + tbt
            for request in decodes
            if (tbt := self.targets(request.request_id).tbt) is not None
        )
        first = min(due, default=None)
        return None if first is None else first - now

    def emitted(self, request_ids: Sequence[str], now: float) -> tuple[int, int]:
        """Record that requests got tokens; return how many missed their TTFT and TBT targets."""
        last = self._last_token
        ttft = tbt = 0
        if self._own or self._default != NO_TARGETS:
            late_since = -math.inf if self._default.tbt is None else now - self._default.tbt
            # The usual case, without a call per token: a later token, under the default target.
            unusual = [
                i for i in request_ids if i in self._own or last.get(i, -math.inf) <= late_since
            ]
            for request_id in unusual:
                misses = self._misses(request_id, now)
                ttft += misses[0]
                tbt += misses[1]
        last.update(dict.fromkeys(request_ids, now))
        return ttft, tbt

    def _misses(self, request_id: str, now: float) -> tuple[bool, bool]:
        """Whether a token that comes now misses the request's TTFT or its TBT target."""
        targets = self.targets(request_id)
        last = self._last_token.get(request_id)
        if last is None:
            waited = now - self._arrived.get(request_id, now)
            return targets.ttft is not None and waited > targets.ttft, False
        return False, targets.tbt is not None and now - last > targets.tbt

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop finished requests."""
        for request_id in request_ids:
            self._arrived.pop(request_id, None)
            self._last_token.pop(request_id, None)
            self._own.pop(request_id, None)
            self._sessions.pop(request_id, None)
