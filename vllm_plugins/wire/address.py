"""Where a server of the wire listens, in a form that travels inside a request."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_plugins.wire.errors import WireDamagedError

UNIX_PREFIX = "vllm-plugins-"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")
# Letters, digits and what IPv4, IPv6 (with a zone) and host names need.
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")
# An address comes from elsewhere: without the prefix it could name any program's socket.
_UNIX = re.compile(rf"({UNIX_PREFIX}[0-9a-f]{{32}})?")
_HOST_ID = re.compile(r"([0-9a-f]{32})?")


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: Name or IP address for TCP.
        port: TCP port, 1 to 65535.
        unix: Name of the abstract Unix socket, without its leading zero byte; empty without one.
        host_id: What `host_id` returned to the server; the Unix socket can be reached from where it
            returns the same.
    """

    host: str
    port: int
    unix: str = ""
    host_id: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def to_json(self) -> dict[str, Any]:
        """Return the address as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Address:
        """Read an address from the plain values of JSON.

        Raises:
            WireDamagedError: It is none.
        """
        if not isinstance(value, dict) or not {"host", "port"} <= value.keys() <= _FIELDS:
            raise WireDamagedError("an address has host, port, and perhaps unix and host_id")
        address = cls(**value)
        texts = ((_HOST, address.host), (_UNIX, address.unix), (_HOST_ID, address.host_id))
        for pattern, text in texts:
            if not isinstance(text, str) or not pattern.fullmatch(text):
                raise WireDamagedError("an address has a malformed host, unix or host_id")
        if type(address.port) is not int or not 1 <= address.port <= 65535:
            raise WireDamagedError("an address has a port from 1 to 65535")
        return address


_FIELDS = frozenset(Address.__dataclass_fields__)


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, or the name that always means one."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_id() -> str:
    """Return what tells this boot of this machine and its network namespace from all others.

    Abstract Unix sockets are visible within one network namespace, so containers on one machine
    may or may not share them.

    Returns:
        32 hexadecimal digits; empty where the system does not tell, and then equal to no other.
    """
    try:
        identity = f"{_BOOT_ID.read_text().strip()} {_NETWORK_NAMESPACE.stat().st_ino}"
    except OSError:
        return ""
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
