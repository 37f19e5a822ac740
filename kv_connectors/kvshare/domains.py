"""Tenant domains: who may use whose KV.

A domain is known by a keyed digest, so that nobody can guess another tenant's from its name or
its salt. See section "Security" of the README for what each scope trusts.
"""

from __future__ import annotations

import hashlib
import hmac
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_plugins.kv_connectors.kvshare.tenancy import TenantSalts, read_key

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

# Salts whose domains are remembered; a waiting request's is asked for in every step.
REMEMBERED_SALTS = 4096


class Domains:
    """The domains of one server.

    Args:
        options: The plug-in's options.
        secret: Key of the digests where there is no tenant secret.

    Attributes:
        public: Digest of the domain of canonical segments, which an operator registers and every
            other domain may use; None where there are none.

    Raises:
        PluginError: The tenant secret cannot be read.
    """

    def __init__(self, options: KVShareOptions, secret: bytes) -> None:
        self._secret = secret
        self._salts: TenantSalts | None = None
        if options.tenant_secret_file is not None:
            self._secret = read_key(
                "--plugin kvshare: tenant_secret_file", options.tenant_secret_file
            )
            self._salts = TenantSalts(self._secret)
        canonical = options.sharing_scope == "public_canonical"
        self.public = self._digest(b"public") if canonical else None
        self._of = lru_cache(REMEMBERED_SALTS)(self._of_salt)

    def of(self, salt: str | None) -> bytes | None:
        """Return the domain of requests with a ``cache_salt``.

        Returns:
            A digest of 32 bytes; None where they share with nobody, as their salt does not come
            from the front door.
        """
        return self._of(salt)

    def _of_salt(self, salt: str | None) -> bytes | None:
        if self._salts is not None:
            return self._salts.domain(salt)
        return self._digest(
            b"shared" if salt is None else b"salt:" + salt.encode("utf-8", "surrogatepass")
        )

    def _digest(self, text: bytes) -> bytes:
        return hmac.new(self._secret, b"kvshare-domain:" + text, hashlib.sha256).digest()
