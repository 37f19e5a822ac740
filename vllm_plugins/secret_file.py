"""Secrets in files: keys that servers, tenants and operators share."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vllm_plugins.errors import PluginError

LEAST_BYTES, MOST_BYTES = 32, 4096
HOW_TO_MAKE = "make one with `(umask 077; openssl rand -hex 32 > FILE)`"


def read_secret(where: str, path: Path, mend: str = HOW_TO_MAKE) -> bytes:
    """Return the secret in a file, without white space around it.

    Args:
        where: What names the file, in the user's words, for the message.
        path: A regular file of 32 bytes to 4 KiB. As with the keys of ssh, its group and others
            must not have any access to it; the group may where somebody else owns it, as with
            secrets that a cluster mounts.
        mend: What helps where there is no such file.

    Raises:
        PluginError: It is not such a file.
    """
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _check(where, os.fstat(descriptor), mend)
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PluginError(where, f"cannot be read: {error.strerror}", mend) from None
    secret = text.strip()
    if len(secret) < LEAST_BYTES or len(text) > MOST_BYTES:
        raise PluginError(where, f"does not hold {LEAST_BYTES} to {MOST_BYTES} bytes", mend)
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
