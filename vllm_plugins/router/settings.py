"""Settings of the router and which of them cannot go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from vllm_plugins.errors import PluginError
from vllm_plugins.wire.address import is_loopback

MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 4096


@dataclass(frozen=True)
class RouterSettings:
    """What the operator has chosen; the command line describes each option.

    Times are in seconds, sizes in bytes or tokens, as the names say.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    encode: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    dispatch: str = "backlog"
    first_token: Literal["decode", "prefill"] = "decode"
    stream_layers: bool = False
    retries: int = 1
    request_timeout_s: float = 600.0
    stall_timeout_s: float = 60.0
    connect_timeout_s: float = 3.0
    lease_s: float = 30.0
    max_queue: int = 256
    queue_timeout_s: float = 60.0
    max_prefill_tokens: int = 0
    max_encoder_tokens: int = 0
    decode_kv_fraction: float = 1.0
    max_body_mib: float = 64.0
    max_connections: int = 4096
    probe_s: float = 1.0
    fail_threshold: int = 3
    metrics_s: float = 0.5
    start_timeout_s: float = 600.0
    overlap: bool = True
    irp: Literal["image", "off"] = "image"
    roles: Literal["static", "soft"] = "static"
    interval_s: float = 5.0
    cooldown_s: float = 30.0
    min_gain: float = 0.1
    min_per_stage: int = 1
    drain_s: float = 30.0
    secret_file: Path | None = None
    admin_key_file: Path | None = None
    api_key: str = ""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            PluginError: With the option, the reason and the mend.
        """
        self._check_instances()
        self._check_roles()
        self._check_stream_layers()
        if not is_loopback(self.host) and self.admin_key_file is None:
            raise PluginError(
                f"--host {self.host}",
                "others can reach the router, and with it the routes that change its instances",
                "give --admin-key-file, or bind a loopback address",
            )
        if self.stall_timeout_s > self.request_timeout_s:
            raise PluginError(
                f"--stall-timeout-s {self.stall_timeout_s:g}",
                f"is above --request-timeout-s {self.request_timeout_s:g}, so it never acts",
                "lower it",
            )

    def _check_instances(self) -> None:
        if not self.prefill:
            raise PluginError("--prefill", "names no instance", "give at least one URL")
        if not self.decode and not self.encode:
            raise PluginError(
                "--decode",
                "names no instance, and without --encode there is nothing to disaggregate",
                "give at least one URL",
            )
        seen: dict[str, str] = {}
        for option, urls in (
            ("--prefill", self.prefill),
            ("--decode", self.decode),
            ("--encode", self.encode),
        ):
            for url in urls:
                check_url(f"{option} {url}", url)
                if url in seen:
                    raise PluginError(
                        f"{option} {url}",
                        f"is named by {seen[url]} already",
                        "name each instance once; with --roles soft it takes other roles by itself",
                    )
                seen[url] = option

    def _check_stream_layers(self) -> None:
        if self.stream_layers and self.first_token == "prefill":
            raise PluginError(
                "--stream-layers",
                "asks both instances at once, and with --first-token prefill the second one is "
                "asked with the first one's token",
                "drop one of the two",
            )
        if self.stream_layers and not self.decode:
            raise PluginError(
                "--stream-layers", "nothing is handed over without --decode", "drop it"
            )

    def _check_roles(self) -> None:
        stages = [urls for urls in (self.prefill, self.decode, self.encode) if urls]
        if any(len(urls) < self.min_per_stage for urls in stages):
            raise PluginError(
                f"--min-per-stage {self.min_per_stage}",
                "a stage has fewer instances from the start",
                "lower it or add instances",
            )
        if self.roles == "soft" and self.cooldown_s < self.interval_s:
            raise PluginError(
                f"--cooldown-s {self.cooldown_s:g}",
                f"is below --interval-s {self.interval_s:g}",
                "raise it",
            )


def check_url(where: str, url: str) -> None:
    """Refuse what is no plain base address of an HTTP server.

    Raises:
        PluginError: It is not, or holds a password, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if (
        not known
        or "@" in url
        or "?" in url
        or "#" in url
        or not url.isascii()
        or url.split() != [url]
    ):
        raise PluginError(where, "is no address of an instance", "write http://HOST:PORT")


def read_admin_key(path: Path | None) -> bytes | None:
    """Return the key that guards the routes which change the instances.

    Raises:
        PluginError: The file cannot be read, or is no good key.
    """
    if path is None:
        return None
    where = f"--admin-key-file {path}"
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES + 1).strip()
    except OSError as error:
        raise PluginError(where, f"cannot be read: {error.strerror}", "name a file") from None
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES or not key.isascii():
        raise PluginError(
            where,
            f"holds {len(key)} bytes, or others than ASCII",
            f"write a random text of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} characters",
        )
    return key
