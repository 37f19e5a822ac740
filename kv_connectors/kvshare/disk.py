"""The disk tier: stored segments in files, which outlive the server.

Under the folder that the operator names stand ``domain.key``, the secret of the domains' digests,
and one folder for each *fingerprint*, which names whatever KV depends on. There each rank has a
folder of its own, ``rank<r>/<key>.safetensors`` (``segment_file.py``). What is stored is decided by
the index alone: a worker writes what it is told to save and removes what it is told to forget.

Other users must not be able to write there, and nobody but the owner may read: KV and token ids
are the tenants' data.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, TextIO

import torch
from vllm.logger import init_logger

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare import segment_file
from vllm_plugins.kv_connectors.kvshare.segment_file import DamagedFileError, KVShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm_plugins.kv_connectors.kvshare.transfer import Label

logger = init_logger("vllm.vllm_plugins.kvshare")

SECRET_BYTES = 32
READERS = 2
# A server that is told to end has this long to write what is still in memory.
CLOSE_SECONDS = 5.0
# Keys that one life of a server cannot use up.
KEYS_OF_A_LIFE = 1 << 40

_NAME = re.compile(r"(0|[1-9][0-9]{0,18})\.safetensors")
_OPTION = "--plugin kvshare: disk_path"


def private_folder(path: Path) -> Path:
    """Make a folder of ours if there is none, and return it.

    Raises:
        PluginError: It cannot be made, it belongs to somebody else, or others can write to it.
    """
    where = f"{_OPTION}={path}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise PluginError(
            where, f"cannot be used: {error.strerror}", "name a folder on a local disk"
        ) from None
    if status.st_uid != os.geteuid():
        raise PluginError(where, "belongs to another user", "name a folder of the server's user")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise PluginError(where, "can be written to by others", f"chmod go-w {path}")
    return path


def segment_path(folder: Path, key: int) -> Path:
    """Return the path of a segment's file in a rank's folder."""
    return folder / f"{key}.safetensors"


def rank_folder(folder: Path, rank: int) -> Path:
    """Return the folder of a tensor-parallel rank in an engine's folder."""
    return folder / f"rank{rank}"


def _files(folder: Path) -> dict[int, Path]:
    """Return the segments' files in a rank's folder; all others are left alone."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(name[1]): path for name, path in names if name}


class Catalogue:
    """The scheduler's view of an engine's folder, which is this engine's alone until it is closed.

    Args:
        disk_path: The folder that the operator named.
        fingerprint: Of the engine; see ``fingerprint.py``.

    Attributes:
        domain_key: Secret of the domains' digests, the same in every life of the server.
        first_key: Greater than all keys of earlier lives.

    Raises:
        PluginError: The folder cannot be used, or another server uses it.
    """

    def __init__(self, disk_path: Path, fingerprint: str) -> None:
        private_folder(disk_path)
        self._folder = private_folder(disk_path / fingerprint)
        self._rank = private_folder(rank_folder(self._folder, 0))
        try:
            self.domain_key = _domain_key(disk_path)
            self._lock = self._locked()
            self.first_key = self._next_life()
        except OSError as error:
            raise PluginError(
                f"{_OPTION}={disk_path}",
                f"cannot be used: {error.strerror}",
                "name a folder on a local disk with room",
            ) from None

    def labels(self) -> dict[int, Label]:
        """Return what the files of rank 0 say of their segments; those that are damaged go."""
        found: dict[int, Label] = {}
        for key, path in _files(self._rank).items():
            try:
                found[key] = segment_file.read_label(path, key)
            except (DamagedFileError, OSError) as error:
                _discard(path, error)
        return found

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    def _locked(self) -> TextIO:
        lock = os.fdopen(_private(self._folder / "lock", os.O_WRONLY | os.O_CREAT), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise PluginError(
                f"{_OPTION}={self._folder.parent}",
                "another server with this model uses it",
                "give each server a folder of its own",
            ) from None
        return lock

    def _next_life(self) -> int:
        """Return the first key of this life, and note it for the next one.

        It grows with the clock, so that it is new even where the folder was emptied and another
        rank's was not. Should the clock go back, the note still says where the last life began.
        """
        note = self._folder / "first_key"
        try:
            last = int(note.read_text())
        except (OSError, ValueError):
            last = 0
        first = max(time.time_ns(), last + KEYS_OF_A_LIFE)
        temporary = note.with_suffix(".tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(_private(temporary, flags), "w") as file:
            file.write(str(first))
        temporary.rename(note)
        return first


def _private(path: Path, flags: int) -> int:
    """Open a file that is for its owner's eyes, never through a link; return its descriptor."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _domain_key(folder: Path) -> bytes:
    """Return the secret of a folder, made by the first server that uses it."""
    path = folder / "domain.key"
    temporary = folder / f"domain.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    if not path.exists():
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(_private(temporary, flags), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        try:
            # Unlike a rename, a link does not replace the key of who came first.
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    with os.fdopen(_private(path, os.O_RDONLY), "rb") as file:
        status = os.fstat(file.fileno())
        key = file.read(SECRET_BYTES + 1)
    if len(key) != SECRET_BYTES or stat.S_IMODE(status.st_mode) & 0o077:
        raise PluginError(
            f"{_OPTION}={folder}",
            "its domain.key is damaged or open to others",
            "remove it, and with it the use of all that is stored",
        )
    return key


@dataclass(eq=False)
class _Write:
    """A segment to be written; its KV is taken away where it is forgotten before."""

    key: int
    label: Label
    kv: torch.Tensor | None
    computed: torch.cuda.Event | None


class DiskTier:
    """Files of one worker's segments, written and read by threads of its own.

    All methods are for the worker's thread, and none but `close` waits for the disk.

    Args:
        folder: The rank's own folder.
        shape: Sizes of the KV.
        device: Where the KV cache is.

    Raises:
        PluginError: The folder cannot be used.
    """

    def __init__(self, folder: Path, shape: KVShape, device: torch.device) -> None:
        self._folder, self._shape, self._device = private_folder(folder), shape, device
        self._sizes: dict[int, int] = {}
        for key, path in _files(folder).items():
            # The scheduler has not taken the lock yet: another server may still be at work here.
            with contextlib.suppress(FileNotFoundError):
                self._sizes[key] = path.lstat().st_size
        self._writes: dict[int, _Write] = {}
        self._done: SimpleQueue[tuple[_Write, int | None]] = SimpleQueue()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._warned = False
        self._writer = Thread(target=self._work, name="kvshare-disk-writer", daemon=True)
        self._writer.start()
        self._readers = ThreadPoolExecutor(READERS, "kvshare-disk-reader", self._use_device)

    def __contains__(self, key: int) -> bool:
        return key in self._sizes

    def size(self, key: int) -> int:
        """Return the bytes of a segment's file, a little more than its KV's."""
        return self._sizes[key]

    def is_writing(self, key: int) -> bool:
        """Whether a segment waits to be written, so that its KV must stay in memory."""
        return key in self._writes

    def write(
        self, key: int, label: Label, kv: torch.Tensor, computed: torch.cuda.Event | None
    ) -> None:
        """Write a segment some time.

        Args:
            key: The segment.
            label: What the index knows of it.
            kv: In host memory, shape (layers, 2, tokens, kv heads, head size); not to be changed.
            computed: Recorded after the copy that fills ``kv``; None where it is filled already.
        """
        job = self._writes[key] = _Write(key, label, kv, computed)
        self._jobs.put(partial(self._write, job))

    def read(self, key: int) -> Future[torch.Tensor]:
        """Read a segment's KV; the future raises what `segment_file.read_kv` does."""
        path = segment_path(self._folder, key)
        pinned, most = self._device.type == "cuda", self._sizes[key]
        return self._readers.submit(segment_file.read_kv, path, key, self._shape, most, pinned)

    def forget(self, key: int) -> None:
        """Remove a segment's file some time, or do not write it."""
        job = self._writes.pop(key, None)
        if job is not None:
            job.kv = None
        if job is not None or self._sizes.pop(key, None) is not None:
            # By the same thread, so after a writing that is under way.
            self._jobs.put(partial(self._remove, key))

    def keep_only(self, keys: Iterable[int]) -> set[int]:
        """Remove what an earlier life left behind, but for these segments.

        Returns:
            The keys of those that have no file.
        """
        known = set(keys)
        self._jobs.put(self._remove_temporary)
        for key in self._sizes.keys() - known:
            self.forget(key)
        return known - self._sizes.keys()

    def poll(self) -> None:
        """Take note of what was written meanwhile."""
        while not self._done.empty():
            job, size = self._done.get()
            if self._writes.get(job.key) is job:
                del self._writes[job.key]
                if size is not None:
                    self._sizes[job.key] = size

    def close(self) -> None:
        """End the threads; what is not written in time is lost."""
        self._jobs.put(None)
        self._writer.join(CLOSE_SECONDS)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _use_device(self) -> None:
        # Page-locked memory is a matter of the thread's current device.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _work(self) -> None:
        self._use_device()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                # The thread must outlive any one job: without it nothing is written any more.
                logger.warning("kvshare: %s", error)

    @torch.inference_mode()
    def _write(self, job: _Write) -> None:
        kv, size = job.kv, None
        if kv is None:
            return
        try:
            if job.computed is not None:
                job.computed.synchronize()
            size = segment_file.write(segment_path(self._folder, job.key), job.key, job.label, kv)
        except (OSError, MemoryError, RuntimeError) as error:
            if not self._warned:
                logger.warning("kvshare: cannot write to disk, nothing is kept there: %s", error)
            self._warned = True
        # Nobody else may hold it: its memory is another's from now on.
        job.kv = None
        self._done.put((job, size))

    def _remove_temporary(self) -> None:
        # Not before this engine has the folder to itself: they may be another's, still at work.
        for path in self._folder.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _remove(self, key: int) -> None:
        segment_path(self._folder, key).unlink(missing_ok=True)


def _discard(path: Path, error: Exception) -> None:
    logger.warning("kvshare: %s %s; it is not used", path, error)
    try:
        path.unlink(missing_ok=True)
    except OSError:
        logger.warning("kvshare: %s cannot be removed", path)
