"""The HTTP server's front door: tells a request's tenant, and says so in its ``cache_salt``.

vLLM loads the class through its own ``--middleware``, outside its check of ``--api-key``. The body
is therefore read and changed only when an endpoint asks for it: a request that is refused before
costs nothing here.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fastapi import HTTPException
from starlette.datastructures import Headers

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.tenancy import TenantSalts, read_key, unsigned_salt
from vllm_plugins.settings import enabled_plugins

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

logger = logging.getLogger("vllm.vllm_plugins.kvshare")

# What vLLM guards with --api-key, and what else takes a prompt.
PROMPT_PATHS = (
    *("/v1", "/v2", "/inference", "/cohere"),
    *("/invocations", "/generative_scoring", "/pooling", "/classify", "/score", "/rerank"),
)
# The operator's endpoints, which refuse fields that they do not know.
OPERATOR_PATHS = "/v1/kvshare/"
_ABSENT = object()


@dataclass(frozen=True)
class Tenants:
    """How a server tells its tenants.

    Attributes:
        salts: Makes their salts.
        header: Header that names the tenant; None where the API key does.
    """

    salts: TenantSalts
    header: str | None

    def salt(self, headers: Headers, own: object) -> str:
        """Return the salt of a request.

        Args:
            headers: Its headers.
            own: The ``cache_salt`` that the client wrote, of whatever type.
        """
        tenant = self._tenant(headers)
        if tenant is None:
            return unsigned_salt()
        return self.salts.salt(tenant, own if isinstance(own, str) and own else None)

    def _tenant(self, headers: Headers) -> str | None:
        if self.header is not None:
            named = headers.getlist(self.header)
            # One of several may be the client's own, which the gateway should have dropped.
            return named[0].strip() or None if len(named) == 1 else None
        # As vLLM reads the key, so that it is the one that was checked.
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        return key if scheme.lower() == "bearer" and key else None


class TenantFrontDoor:
    """ASGI middleware that gives every request with a prompt the salt of its tenant.

    A request that names no tenant gets a fresh salt that nobody else has, so it shares neither this
    plug-in's store nor vLLM's prefix cache. What a client writes as ``cache_salt`` only divides its
    tenant's domain, whatever it looks like; what is no text, or an empty one, counts as none.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tenants: Tenants | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, with another body where it is a request with a prompt."""
        if scope["type"] == "http" and scope["method"] == "POST" and _has_prompt(scope):
            receive = self._salting(scope, receive)
        await self._app(scope, receive, send)

    def _salting(self, scope: Scope, receive: Receive) -> Receive:
        """Return a ``receive`` that delivers the salted body in one piece, then what follows it."""
        pieces: list[bytes] = []
        complete = False

        async def salting_receive() -> Message:
            nonlocal complete
            while not complete:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                pieces.append(message.get("body", b""))
                complete = not message.get("more_body", False)
                if complete:
                    body = self._salted(scope, b"".join(pieces))
                    pieces.clear()
                    return {"type": "http.request", "body": body, "more_body": False}
            # From here on it only says when the client hangs up.
            return await receive()

        return salting_receive

    def _salted(self, scope: Scope, body: bytes) -> bytes:
        """Return a body with its tenant's salt; what is no JSON object, for vLLM to refuse.

        Raises:
            HTTPException: The tenant cannot be told, or the body is too deeply nested.
        """
        tenants = self._known_tenants(scope)
        try:
            request = json.loads(body)
            # SageMaker's session requests hold nothing else, so no prompt, and may not.
            if tenants is None or not isinstance(request, dict) or set(request) == {"requestType"}:
                return body
            request["cache_salt"] = tenants.salt(_headers(scope), request.get("cache_salt"))
            salted = json.dumps(request).encode()
        except RecursionError:
            # What is too deep for this stack need not be for the endpoint's, so it must not pass.
            raise HTTPException(400, "The request's JSON is nested too deeply.") from None
        except ValueError:
            return body
        _set_length(scope, len(salted))
        return salted

    def _known_tenants(self, scope: Scope) -> Tenants | None:
        """Return how tenants are told; None where there is no engine, so nothing to share.

        Raises:
            HTTPException: It cannot be known. Clients count on a domain of their own, so none of
                them is served in a common one.
        """
        if self._tenants is None:
            state = scope["app"].state
            if getattr(state, "engine_client", _ABSENT) is None:
                # A render server: its output goes through an engine server's own front door.
                return None
            try:
                self._tenants = _tenants_of(getattr(state, "vllm_config", None))
            except PluginError as error:
                logger.error("vllm-plugins: kvshare refuses requests: %s", error)
                reason = "The server cannot tell whose the request is. Its log says why."
                raise HTTPException(503, reason) from None
        return self._tenants


def _tenants_of(config: Any) -> Tenants:
    enabled = [] if config is None else enabled_plugins(config)
    for item in enabled:
        if item.plugin.name == "kvshare":
            options = cast("KVShareOptions", item.options)
            if options.tenant_secret_file is not None:
                secret = read_key(
                    "--plugin kvshare: tenant_secret_file", options.tenant_secret_file
                )
                return Tenants(TenantSalts(secret), options.tenant_header)
    raise PluginError(
        f"--middleware {__name__}.{TenantFrontDoor.__name__}",
        "works only with --plugin kvshare and its option tenant_secret_file",
        "use --plugin kvshare:sharing_scope=tenant,tenant_secret_file=FILE",
    )


def _has_prompt(scope: Scope) -> bool:
    """Whether a POST goes where prompts do and its body may be read as JSON."""
    path: str = scope["path"]
    below = path.removeprefix(scope.get("root_path", ""))
    if not path.startswith(PROMPT_PATHS) and not below.startswith(PROMPT_PATHS):
        return False
    return not below.startswith(OPERATOR_PATHS) and _is_json(scope)


def _is_json(scope: Scope) -> bool:
    """Whether FastAPI may take the body for JSON, which it does for more than one type."""
    kind = _headers(scope).get("Content-Type", "").partition(";")[0].strip().lower()
    return not kind or (kind.startswith("application/") and kind.endswith("json"))


def _headers(scope: Scope) -> Headers:
    # Made from the scope itself it would put a list of its own there.
    return Headers(raw=list(scope["headers"]))


def _set_length(scope: Scope, length: int) -> None:
    """Correct the headers that say how long the body is."""
    framing = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in framing]
    headers.append((b"content-length", str(length).encode()))
    if isinstance(scope["headers"], list):
        # In place: an endpoint's request, which may have looked at them already, keeps the list.
        scope["headers"][:] = headers
    else:
        scope["headers"] = headers
