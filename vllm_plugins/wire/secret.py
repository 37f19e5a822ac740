"""The secret that both ends of the wire know.

Where the user names no file, all servers of one user on one host share a secret that the first of
them makes in the user's home. It does not lie in ``$XDG_RUNTIME_DIR`` or a cache: those are unset
for some of a user's processes or emptied while others run, and servers would then not understand
each other.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from vllm_plugins.errors import PluginError

LEAST_SECRET_BYTES, MOST_SECRET_BYTES = 32, 4096
HOW_TO_MAKE = "make one with `(umask 077; openssl rand -hex 32 > FILE)`"
_WHERE = "secret of the wire"


def load_secret(path: Path | None) -> bytes:
    """Return the secret in a file, without white space around it.

    Args:
        path: A regular file of 32 bytes to 4 KiB. Its group and others must not have any access to
            it; the group may where somebody else owns it, as with secrets that a cluster mounts.
            None means the user's own secret, which is made on first use.

    Raises:
        PluginError: There is no such file, or none can be made.
    """
    if path is not None:
        return _read(path, HOW_TO_MAKE)
    try:
        own = _own_secret()
    except (OSError, RuntimeError) as error:
        raise PluginError(
            _WHERE, f"none can be made: {error}", "name a file that holds one"
        ) from None
    return _read(own, "remove it while no server runs, so that a new one is made")


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


def _read(path: Path, mend: str) -> bytes:
    where = f"{_WHERE}, {path}"
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _check(where, os.fstat(descriptor), mend)
            text = file.read(MOST_SECRET_BYTES + 1)
    except OSError as error:
        raise PluginError(where, f"cannot be read: {error.strerror}", mend) from None
    secret = text.strip()
    if len(secret) < LEAST_SECRET_BYTES or len(text) > MOST_SECRET_BYTES:
        reason = f"does not hold {LEAST_SECRET_BYTES} to {MOST_SECRET_BYTES} bytes"
        raise PluginError(where, reason, mend)
    return secret


def _check(where: str, status: os.stat_result, mend: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PluginError(where, "is not a regular file", mend)
    barred = 0o077 if status.st_uid == os.geteuid() else 0o007
    if status.st_mode & barred:
        mode = stat.S_IMODE(status.st_mode)
        raise PluginError(
            where, f"others may read or write it (mode {mode:04o})", "set its mode to 0600"
        )
