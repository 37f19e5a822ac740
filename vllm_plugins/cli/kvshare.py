"""``vllm-plugins kvshare``: the operator's view of the KV that a running server stores."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.tenancy import read_key

HELP = "Show, fill and empty what a server with --plugin kvshare stores."
ROUTES = "/v1/kvshare"
KEY_HEADER = "X-KVShare-Operator-Key"
# Longer than the server waits for its engine.
TIMEOUT_S = 150.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``kvshare``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    parent = _common_arguments()
    text = "Show what is stored, by domain, and the registered texts by name."
    actions.add_parser("inspect", parents=[parent], help=text, description=text)
    text = "Compute a text in a fixed context and store it for all tenants."
    register = actions.add_parser("register", parents=[parent], help=text, description=text)
    register.add_argument("name", metavar="NAME", help="name for the text")
    register.add_argument("file", metavar="FILE", type=Path, help="the text, UTF-8, taken as it is")
    register.add_argument(
        "--context-file",
        metavar="FILE",
        type=Path,
        help="text that it is computed behind, which is not stored (default: the tokenizer's first "
        "token alone)",
    )
    text = "Forget stored KV: a registered text, a domain, or everything."
    evict = actions.add_parser("evict", parents=[parent], help=text, description=text)
    what = evict.add_mutually_exclusive_group(required=True)
    what.add_argument("name", metavar="NAME", nargs="?", help="a registered text")
    what.add_argument("--domain", metavar="DIGEST", help="a domain, as `inspect` shows it")
    what.add_argument("--all", action="store_true", help="everything, registered texts included")


def _common_arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="address of the server (default: %(default)s); the keys go there, so use https or a "
        "tunnel to another machine",
    )
    common.add_argument(
        "--operator-key-file",
        metavar="FILE",
        type=Path,
        required=True,
        help="file with the operator's key, as in the plug-in's option operator_key_file",
    )
    common.add_argument(
        "--api-key", metavar="KEY", help="the server's --api-key, if any (default: VLLM_API_KEY)"
    )
    common.add_argument("--json", action="store_true", help="print the server's answer as JSON")
    return common


def run(args: argparse.Namespace) -> int:
    """Give the order and print the answer."""
    server = _Server(args)
    answer = {"inspect": _inspect, "register": _register, "evict": _evict}[args.action](
        server, args
    )
    if args.json:
        print(json.dumps(answer, indent=1))
    elif args.action == "inspect":
        _print_store(answer)
    elif args.action == "register":
        print(f"registered {args.name}: {_amount(answer)}")
    else:
        print(f"evicted {_amount(answer, 'evicted_')}")
    return 0


class _Server:
    """The server that the arguments name.

    Args:
        args: Parsed arguments, of which the keys and the address are used.

    Raises:
        PluginError: One of them is wrong.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if not _is_http(args.url):
            raise PluginError(f"--url {args.url}", "is no HTTP address", "write http://HOST:PORT")
        key = read_key("--operator-key-file", args.operator_key_file)
        self._url = args.url.rstrip("/") + ROUTES
        self._headers = {KEY_HEADER: key.decode(), "Content-Type": "application/json"}
        api_key = args.api_key or os.environ.get("VLLM_API_KEY")
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Return the server's answer to a request.

        Raises:
            PluginError: There is none, or it is a refusal.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, data, self._headers, method=method)
        # Neither a proxy nor whom the server may point to is to see the keys.
        opener = build_opener(ProxyHandler({}), _NoRedirect)
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                text = answer.read()
        except HTTPError as error:
            raise PluginError(self._url + path, *_refusal(error)) from None
        except (OSError, HTTPException) as error:
            raise self._wrong(f"no answer: {_flat(getattr(error, 'reason', error))}") from None
        except ValueError:
            # Its text may hold a key.
            raise self._wrong("cannot be asked: the address or --api-key is malformed") from None
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise self._wrong("does not answer with a JSON object")
        return parsed

    def _wrong(self, reason: str) -> PluginError:
        return PluginError(f"--url {self._url}", reason, "check the address and the server")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


class _NoRedirect(HTTPRedirectHandler):
    """Takes a redirect for the refusal that it is here."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""


def _refusal(error: HTTPError) -> tuple[str, str]:
    """Return what the server says of a refused request, and what mends it."""
    said = error.reason
    try:
        told = json.load(error)
        # vLLM's own form, and that of the framework below it.
        told = told.get("error") or told["detail"]
        said = told["message"] if isinstance(told, dict) else told
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        # A proxy, or no vLLM at all: the status line has to do.
        pass
    reason = f"{_flat(said)} (HTTP status {error.code})"
    if error.code == 401:
        return reason, "check --operator-key-file and --api-key"
    if error.code == 404 and said == "Not Found":
        return reason, "start the server with VLLM_PLUGINS=vllm_plugins,kvshare_operator"
    return reason, "`vllm-plugins kvshare inspect` shows what is stored"


def _flat(text: object) -> str:
    """Return a text in one line."""
    return " ".join(str(text).split())


def _inspect(server: _Server, args: argparse.Namespace) -> dict[str, Any]:
    return server.ask("GET", "/store")


def _register(server: _Server, args: argparse.Namespace) -> dict[str, Any]:
    wanted = {"name": args.name, "text": _text("FILE", args.file)}
    if args.context_file is not None:
        wanted["context"] = _text("--context-file", args.context_file)
    return server.ask("POST", "/segments", wanted)


def _evict(server: _Server, args: argparse.Namespace) -> dict[str, Any]:
    if args.all:
        return server.ask("DELETE", "/store")
    kind, name = ("domains", args.domain) if args.domain else ("segments", args.name)
    return server.ask("DELETE", f"/{kind}/{quote(name, safe='')}")


def _text(option: str, path: Path) -> str:
    try:
        # Not as text, which would change the ends of lines.
        return path.read_bytes().decode()
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        reason = "is not UTF-8 text"
    raise PluginError(f"{option} {path}", reason, "name a text file")


def _amount(answer: Mapping[str, Any], prefix: str = "") -> str:
    tokens, segments = answer.get(f"{prefix}tokens"), answer.get(f"{prefix}segments")
    return f"{tokens} tokens in {segments} segments"


def _print_store(store: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    used, capacity = store.get("used_tokens"), store.get("capacity_tokens")
    console.print(f"{used} of {capacity} tokens in {store.get('segments')} segments")
    for title, column, rows in (
        ("Domains", "domain", store.get("domains")),
        ("Registered texts", "name", store.get("canonical")),
    ):
        table = Table(column, "tokens", "segments", "hits", title=title)
        for row in rows or ():
            table.add_row(
                *(escape(str(row.get(k))) for k in (column, "tokens", "segments", "hits"))
            )
        if table.row_count:
            console.print(table)
