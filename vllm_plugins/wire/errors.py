"""What can go wrong between two ends of the wire.

None of these says that wrong data was delivered: a frame arrives whole and checked, or not at all.
"""

from __future__ import annotations


class WireError(Exception):
    """Base of all errors of the wire.

    Args:
        text: What happened, in one line.

    Attributes:
        peer: Description of the other end, once it is known.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.peer = ""

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.peer}: {text}" if self.peer else text


class WireClosedError(WireError):
    """The peer cannot be reached, or it closed or reset the connection."""


class WireTimeoutError(WireError):
    """The peer did not send or take everything in time."""


class WireDamagedError(WireError):
    """What arrived is not what a peer of this wire sends: checksum, sequence, length or JSON."""


class WireRefusedError(WireError):
    """The peer was refused or refuses: version, secret, limits, or an error of its own."""
