"""A server's secrets, the signed salts of its tenants, and the signed orders of its operator.

A tenant's ``cache_salt`` is made by the server's front door and verified beside the scheduler. What
a client writes itself never verifies. Every use of a secret has a key of its own, derived from it
with another label, so that nothing signed for one use passes for another.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_plugins.errors import PluginError
from vllm_plugins.secret_file import HOW_TO_MAKE, read_secret

_TENANT, _CANONICAL, _UNSIGNED = "kvshare.tenant.", "kvshare.canonical.", "kvshare.unsigned."
# 256 bits of domain and 128 of signature: 112 characters of the 128 that vLLM lets a salt have.
_SIGNED_SALT = re.compile(re.escape(_TENANT) + r"([0-9a-f]{64})\.([0-9a-f]{32})")
_SIGNATURE_BYTES = 16
# Of a domain's digest; 128 bits each.
_HALF = 16
# Whoever sends an order pays for reading it only up to here; genuine ones are far smaller.
_MOST_FIELDS, _MOST_FIELD_CHARACTERS = 8, 256


def read_key(option: str, path: Path) -> bytes:
    """Return the secret in a file, which is printable ASCII text.

    Args:
        option: The option that names the file, in the user's words, for the message.
        path: As `read_secret` takes it.

    Raises:
        PluginError: It is not such a file.
    """
    where = f"{option}={path}"
    key = read_secret(where, path)
    # A key travels in an HTTP header, and random bytes may end in what looks like white space.
    if not all(0x20 <= byte < 0x7F for byte in key):
        raise PluginError(where, "is not one line of printable ASCII text", HOW_TO_MAKE)
    return key


class TenantSalts:
    """Makes and verifies the ``cache_salt`` by which a tenant's requests are told.

    Args:
        secret: The server's tenant secret; another one makes other domains of the same tenants.
    """

    def __init__(self, secret: bytes) -> None:
        self._naming = _derived(secret, "tenant domain")
        self._dividing = _derived(secret, "division of a domain")
        self._signing = _derived(secret, "tenant salt")

    def salt(self, tenant: str, own: str | None) -> str:
        """Return the signed salt of a tenant's request, the same each time.

        Args:
            tenant: Name or key of the tenant; cannot be told from the salt.
            own: The salt that the client sent itself, which divides its tenant's domain further
                and cannot lead out of it; None where it sent none.

        Returns:
            At most 128 characters, all of which vLLM takes in a salt.
        """
        # Its first half names the tenant, whose domains share a quota; the other one the division.
        division = _mac(self._dividing, _framed((tenant,) if own is None else (tenant, own)))
        domain = _mac(self._naming, _framed((tenant,)))[:_HALF] + division[:_HALF]
        return f"{_TENANT}{domain.hex()}.{self._signature(domain)}"

    def domain(self, salt: str | None) -> bytes | None:
        """Return the domain that a salt names, a digest of 32 bytes; None if it is not ours."""
        found = _SIGNED_SALT.fullmatch(salt) if isinstance(salt, str) else None
        if found is None:
            return None
        domain = bytes.fromhex(found[1])
        return domain if hmac.compare_digest(found[2], self._signature(domain)) else None

    def _signature(self, domain: bytes) -> str:
        return _mac(self._signing, domain)[:_SIGNATURE_BYTES].hex()


class OperatorOrders:
    """Signs and verifies the orders that reach the scheduler inside ordinary requests.

    An order is a flat JSON object of short texts and integers. It never leaves the server, so one
    that was seen cannot be sent again by a client.

    Args:
        key: The operator's key.
    """

    def __init__(self, key: bytes) -> None:
        self._key = _derived(key, "operator order")

    def sign(self, order: Mapping[str, object]) -> dict[str, object]:
        """Return an order with its signature, under ``mac``.

        Raises:
            ValueError: It is no order, or has such a field already.
        """
        if not _is_order(order):
            raise ValueError(f"not an order: {order!r}")
        return {**order, "mac": self._signature(order)}

    def verify(self, signed: object) -> dict[str, Any] | None:
        """Return the order that was signed, without its signature; None if it was not."""
        if not isinstance(signed, dict):
            return None
        order = {name: value for name, value in signed.items() if name != "mac"}
        mac = signed.get("mac")
        if not isinstance(mac, str) or not mac.isascii() or not _is_order(order):
            return None
        return order if hmac.compare_digest(mac, self._signature(order)) else None

    def _signature(self, order: Mapping[str, object]) -> str:
        text = json.dumps(order, sort_keys=True, separators=(",", ":"))
        return _mac(self._key, text.encode()).hex()


def _is_order(order: Mapping[Any, object]) -> bool:
    """Whether all fields are such that different orders have different JSON texts."""
    return len(order) <= _MOST_FIELDS and all(
        type(name) is str
        and name != "mac"
        and len(name) <= _MOST_FIELD_CHARACTERS
        # A Boolean is an integer to Python, and its JSON text another one.
        and (type(value) is int or (type(value) is str and len(value) <= _MOST_FIELD_CHARACTERS))
        for name, value in order.items()
    )


def canonical_salt() -> str:
    """Return a fresh salt for an operator's request, whose blocks are then nobody else's."""
    return _CANONICAL + secrets.token_hex(16)


def unsigned_salt() -> str:
    """Return a fresh salt for a request of no known tenant, which then shares with nobody."""
    return _UNSIGNED + secrets.token_hex(16)


def _derived(secret: bytes, label: str) -> bytes:
    return _mac(secret, b"kvshare-key:" + label.encode())


def _mac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _framed(parts: tuple[str, ...]) -> bytes:
    """Return texts as bytes from which each can be told, whatever is in them."""
    # JSON can spell half of a surrogate pair, which has no other encoding.
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return b"".join(len(part).to_bytes(8, "little") + part for part in encoded)
