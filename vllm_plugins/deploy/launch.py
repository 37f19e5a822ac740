"""Command lines and environments of the servers of a deployment."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_plugins.bench.server import VLLM
from vllm_plugins.deploy.arguments import WHERE
from vllm_plugins.deploy.settings import DeploySettings
from vllm_plugins.errors import PluginError
from vllm_plugins.routing import Role

ROUTER = (sys.executable, "-m", "vllm_plugins.cli.main", "route")
# The router is started with instances that have just answered. If one of them dies meanwhile, it
# is better to start anew with others.
ROUTER_START_S = 30.0
MAX_KEY_BYTES = 4096


def base_url(host: str, port: int) -> str:
    """Return the base address of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def engine_command(settings: DeploySettings, role: Role, host: str, port: int) -> list[str]:
    """Return the command line of one instance.

    Args:
        settings: Of the deployment.
        role: Of the instance.
        host: Address on which it serves requests, KV and embeddings.
        port: For requests.
    """
    plugins = (json.dumps(spec) for spec in settings.plugins(role, host))
    return [
        *VLLM, "serve", settings.model, "--host", host, "--port", str(port),
        *(word for spec in plugins for word in ("--plugin", spec)), *settings.arguments(role),
    ]  # fmt: skip


def router_command(
    settings: DeploySettings, instances: Mapping[Role, Iterable[str]], admin_key_file: Path
) -> list[str]:
    """Return the command line of the router.

    Args:
        settings: Of the deployment.
        instances: Base addresses of the first instances of each role.
        admin_key_file: Holds the key by which further ones are added.
    """
    words = [
        *ROUTER, *settings.router_args, "--host", settings.host, "--port", str(settings.port),
        "--admin-key-file", str(admin_key_file), "--lease-s", f"{settings.lease_s():g}",
        "--drain-s", f"{settings.drain_s:g}", "--start-timeout-s", f"{ROUTER_START_S:g}",
    ]  # fmt: skip
    if settings.secret_file is not None:
        words += ["--secret-file", str(settings.secret_file)]
    for role, urls in instances.items():
        words += [f"--{role.value}", *urls]
    return words


def environment(settings: DeploySettings) -> dict[str, str]:
    """Return what a server's environment has beside that of its parent.

    Raises:
        PluginError: The file with the key cannot be read, or holds none.
    """
    path = settings.api_key_file
    # By the environment, as command lines can be seen by everybody on the machine.
    return {} if path is None else {"VLLM_API_KEY": read_key(path)}


def read_key(path: Path) -> str:
    """Return the key in a file, without white space around it.

    Raises:
        PluginError: It cannot be read, or holds none.
    """
    where = f"{WHERE}: {path}"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_BYTES + 1).strip()
    except OSError as error:
        mend = "put it at the same path on every node"
        raise PluginError(where, f"cannot be read: {error.strerror}", mend) from None
    if not 1 <= len(text) <= MAX_KEY_BYTES or not text.isascii() or text.split() != [text]:
        raise PluginError(
            where, "is no key", f"write one word of at most {MAX_KEY_BYTES} ASCII characters"
        )
    return text.decode()
