"""Options of plug-ins whose instances reach each other over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vllm_plugins.plugin import Options
from vllm_plugins.wire.address import is_loopback


class ListenerOptions(Options):
    """Where an instance listens for others, and whether it may reach beyond its host.

    What each option means depends on who listens for whom, so that a plug-in says it in its own
    words, in `meanings`. Those options stand last among its own, in the order of `meanings`.
    """

    meanings: ClassVar[dict[str, str]]
    """Help text by name, of all options of this class and of others that belong beside them."""

    bind_host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    allow_remote: bool = False
    secret_file: Path | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Give a plug-in's copies of the fields their texts and places."""
        super().__pydantic_init_subclass__(**kwargs)
        for name, text in cls.meanings.items():
            field = cls.model_fields.pop(name)
            field.description = text
            cls.model_fields[name] = field
        cls.model_rebuild(force=True)

    def check_reach(self, *names: str) -> None:
        """Refuse hosts beyond this one where the operator did not allow them, or has no secret.

        Args:
            names: Of the options that hold a host, or None.

        Raises:
            ValueError: One is not loopback, and ``allow_remote`` is off; or it is on, and servers
                would prove to each other the secret that only this host knows.
        """
        for name in names:
            host = getattr(self, name)
            if host is not None and not self.allow_remote and not is_loopback(host):
                raise ValueError(f"{name}={host} needs allow_remote=true")
        if self.allow_remote and self.secret_file is None:
            raise ValueError("allow_remote=true needs secret_file, which all servers share")
