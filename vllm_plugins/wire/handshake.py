"""How two ends prove to each other that they know one secret.

Each sends a HELLO with a nonce, its role and its limits, then a PROOF: an HMAC-SHA256 over both
HELLOs under a label of its own direction. A proof that is reflected has the wrong label, one that
is replayed the wrong nonces. The client proves first, so a stranger gets nothing from a server that
depends on the secret.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from dataclasses import asdict, dataclass

from vllm_plugins.wire.errors import WireDamagedError, WireRefusedError
from vllm_plugins.wire.frame import (
    ERROR,
    HELLO,
    PROOF,
    VERSION,
    Frame,
    Limits,
)
from vllm_plugins.wire.refusals import refusal, refuse, send
from vllm_plugins.wire.stream import FrameStream

CLIENT, SERVER = "client", "server"
# One text for every way to fail, so that it says nothing about the secret.
UNPROVEN = "the secrets of the two ends differ"
_NONCE_BYTES = 32
_NONCE = re.compile(rf"[0-9a-f]{{{2 * _NONCE_BYTES}}}")
_ROLE = re.compile(r"[A-Za-z0-9 ._-]{1,64}")


@dataclass(frozen=True)
class Hello:
    """How one end introduces itself.

    Attributes:
        nonce: Hexadecimal digits, never used twice.
        role: What it is, for log lines: 1 to 64 letters, digits, blanks, dots, dashes, underscores.
        header_bytes: Longest header that it accepts.
        payload_bytes: Longest payload that it accepts.
    """

    nonce: str
    role: str
    header_bytes: int
    payload_bytes: int

    @classmethod
    def new(cls, role: str, limits: Limits) -> Hello:
        """Introduce this end.

        Raises:
            ValueError: The role is too long or has other characters.
        """
        if not _ROLE.fullmatch(role):
            raise ValueError(f"{role!r} cannot be a role")
        nonce = secrets.token_hex(_NONCE_BYTES)
        return cls(nonce, role, limits.header_bytes, limits.payload_bytes)

    @classmethod
    def read(cls, frame: Frame) -> Hello:
        """Read what the peer sent first.

        Raises:
            WireDamagedError: It is no HELLO.
        """
        header = frame.header
        if frame.kind != HELLO or header.keys() != set(cls.__dataclass_fields__):
            raise WireDamagedError("the peer did not introduce itself")
        for name, pattern in (("nonce", _NONCE), ("role", _ROLE)):
            if not isinstance(header[name], str) or not pattern.fullmatch(header[name]):
                raise WireDamagedError(f"the peer introduced itself with a malformed {name}")
        for name in ("header_bytes", "payload_bytes"):
            if type(header[name]) is not int or not 0 <= header[name] < 1 << 64:
                raise WireDamagedError(f"the peer introduced itself with a malformed {name}")
        return cls(**header)

    @property
    def limits(self) -> Limits:
        """What it accepts."""
        return Limits(self.header_bytes, self.payload_bytes)


@dataclass(frozen=True)
class _Transcript:
    """What both ends have seen of each other, under the secret."""

    secret: bytes
    client: Hello
    server: Hello

    def digest(self, label: str) -> str:
        """Return a MAC that serves one purpose, in hexadecimal."""
        said = json.dumps(["vllm-plugins wire", VERSION, label, asdict(self.client),
                           asdict(self.server)])  # fmt: skip
        return hmac.digest(self.secret, said.encode(), "sha256").hex()

    def check(self, frame: Frame, label: str) -> None:
        """Refuse a frame that is not the other end's proof.

        Raises:
            WireRefusedError: It is not.
        """
        mac = frame.header.get("mac")
        expected = self.digest(label)
        given = mac.encode() if isinstance(mac, str) and mac.isascii() else b""
        if frame.kind != PROOF or not hmac.compare_digest(given, expected.encode()):
            raise WireRefusedError(UNPROVEN)

    def seed(self, sender: str) -> int:
        """Return the value from which the checksums of what this end sends start.

        It ties frames to their connection and direction, so that stray ones are found as damaged.
        """
        return int(self.digest(f"checksums of the {sender}")[:8], 16)


def greet_server(
    stream: FrameStream, secret: bytes, role: str, limits: Limits, deadline: float
) -> Hello:
    """Carry out the client's part; return how the server introduced itself.

    Raises:
        WireError: The server is none, refuses, or does not know the secret.
    """
    mine = Hello.new(role, limits)
    send(stream, HELLO, asdict(mine), (), deadline)
    theirs = Hello.read(_answer(stream, deadline))
    transcript = _Transcript(secret, mine, theirs)
    send(stream, PROOF, {"mac": transcript.digest(CLIENT)}, (), deadline)
    transcript.check(_answer(stream, deadline), SERVER)
    stream.start_checksums(transcript.seed(CLIENT), transcript.seed(SERVER))
    stream.limits = limits
    return theirs


def greet_client(
    stream: FrameStream, secret: bytes, role: str, limits: Limits, deadline: float
) -> Hello:
    """Carry out the server's part; return how the client introduced itself.

    Raises:
        WireError: The client is none, speaks another version, or does not know the secret.
    """
    mine = Hello.new(role, limits)
    try:
        theirs = Hello.read(stream.receive(deadline))
        transcript = _Transcript(secret, theirs, mine)
        stream.send(HELLO, asdict(mine), (), deadline)
        transcript.check(stream.receive(deadline), CLIENT)
    except WireRefusedError as error:
        refuse(stream, str(error), deadline)
        raise
    stream.send(PROOF, {"mac": transcript.digest(SERVER)}, (), deadline)
    stream.start_checksums(transcript.seed(SERVER), transcript.seed(CLIENT))
    stream.limits = limits
    return theirs


def _answer(stream: FrameStream, deadline: float) -> Frame:
    frame = stream.receive(deadline)
    if frame.kind == ERROR:
        raise refusal(frame)
    return frame
