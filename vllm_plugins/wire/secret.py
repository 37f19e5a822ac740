"""The secret that both ends of the wire know.

Where the user names no file, all servers of one user on one host share a secret that the first of
them makes in the user's home. It does not lie in ``$XDG_RUNTIME_DIR`` or a cache: those are unset
for some of a user's processes or emptied while others run, and servers would then not understand
each other.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from vllm_plugins.errors import PluginError
from vllm_plugins.secret_file import read_secret

_WHERE = "secret of the wire"


def load_secret(path: Path | None) -> bytes:
    """Return the secret in a file.

    Args:
        path: As `read_secret` takes it. None means the user's own secret, which is made on first
            use.

    Raises:
        PluginError: There is no such file, or none can be made.
    """
    if path is not None:
        return read_secret(f"{_WHERE}, {path}", path)
    try:
        own = _own_secret()
    except (OSError, RuntimeError) as error:
        raise PluginError(
            _WHERE, f"none can be made: {error}", "name a file that holds one"
        ) from None
    mend = "remove it while no server runs, so that a new one is made"
    return read_secret(f"{_WHERE}, {own}", own, mend)


def _own_secret() -> Path:
    """Return the user's own secret file, made where it is missing.

    Raises:
        OSError: It cannot be made.
        RuntimeError: The user has no home.
    """
    path = Path.home() / ".config" / "vllm-plugins" / "wire.secret"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
    return path


def _make(path: Path) -> None:
    """Write a new secret; where another process was faster, its secret stays."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        # Appears whole or not at all, and never in place of one that others have read.
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()
