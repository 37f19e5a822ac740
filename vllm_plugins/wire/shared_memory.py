"""Memory that two processes of one host share, without a name that could outlive them.

The end that reads makes a buffer and sends its descriptor over a Unix socket; the end that writes
maps it. The kernel frees it with the last process that has it, however that ends. What the writer
puts there can change while it is read, and nothing checks it for damage: a reader copies first and
then looks.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from types import TracebackType
from typing import Self

from vllm_plugins.wire.errors import WireRefusedError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedBuffer:
    """A buffer in memory that another process can map, or has shared with this one.

    Args:
        descriptor: An open file in memory, which the buffer owns from now on.
        size: Its length, in bytes.

    Attributes:
        view: Its bytes.
        size: Its length, in bytes.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.descriptor = descriptor
        self.view = memoryview(mmap.mmap(descriptor, size))

    @classmethod
    def create(cls, size: int) -> SharedBuffer:
        """Make a buffer of zeros; the pages come as they are written to.

        Args:
            size: Bytes, at least 1.

        Raises:
            OSError: There is no memory for it.
        """
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        descriptor = os.memfd_create("vllm-plugins-wire", flags)
        try:
            os.ftruncate(descriptor, size)
            # A peer that shrank it would kill this process at its next look behind the end.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, descriptor: int, size: int) -> SharedBuffer:
        """Map a buffer that the peer has made.

        Args:
            descriptor: What `Connection.receive_descriptor` returned; closed if refused.
            size: Length that the peer has told, in bytes; the caller has bounded it.

        Raises:
            WireRefusedError: It is no buffer of that length, or could be shrunk under our feet.
        """
        try:
            _check(descriptor, size)
            return cls(descriptor, size)
        except (OSError, WireRefusedError) as error:
            os.close(descriptor)
            reason = error.strerror if isinstance(error, OSError) else error
            raise WireRefusedError(f"a shared buffer cannot be mapped: {reason}") from None

    def close(self) -> None:
        """Give it back; harmless where that has been done.

        The memory stays mapped as long as something made from `view` is in use.
        """
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        # The mapping goes with the last view of it.
        self.view = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check(descriptor: int, size: int) -> None:
    """Refuse a descriptor that is not a sealed buffer of this size.

    Raises:
        WireRefusedError: It is not.
        OSError: It is no file in memory at all.
    """
    length = os.fstat(descriptor).st_size
    if not 0 < size <= length:
        raise WireRefusedError(f"it has {length} bytes and came with a size of {size}")
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise WireRefusedError("it is not sealed against shrinking")
