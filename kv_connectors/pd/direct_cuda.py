"""CUDA IPC: storages of one process that another one on the host maps, on PyTorch's own ways.

PyTorch counts, in a file of shared memory, who still uses an exported storage, and keeps it for
ever where somebody was killed before it counted down. Nobody needs that count here: a reader that
copies from a cache that has gone gets no word that its KV was kept, and drops what it copied. So
the writer takes its own count back at once, and its caches are freed as if they had never been
exported, with nothing for ``torch.cuda.ipc_collect`` to do; and readers count in no file.
"""

from __future__ import annotations

import ctypes

import torch

from vllm_plugins.kv_connectors.pd.direct import MAX_KEY_BYTES, StorageHandle, UnavailableError


class CudaCaches:
    """Exports and opens storages of one device.

    Args:
        device: The worker's device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.index is not None
        self._index = device.index

    @property
    def device(self) -> str:
        """UUID of the device, which does not depend on what each process sees of the host's."""
        return _uuid(self._index)

    def export(self, storage: torch.UntypedStorage) -> StorageHandle:
        """Export a storage.

        PyTorch puts another pointer in its place meanwhile, so no other thread may use it: this is
        for the engine's own thread, before the first step.

        Raises:
            UnavailableError: Its memory is not from ``cudaMalloc``, as with vLLM's sleep mode.
        """
        try:
            _, key, size, offset, counter, place, _, _ = storage._share_cuda_()
        except RuntimeError as error:
            raise UnavailableError(f"its memory has no IPC handle ({_line(error)})") from None
        torch.UntypedStorage._release_ipc_counter_cuda(counter, place)  # noqa: SLF001
        if len(key) > MAX_KEY_BYTES:
            raise UnavailableError("its memory is in expandable segments")
        return StorageHandle(key, size, offset)

    def open(self, handle: StorageHandle, device: str) -> torch.UntypedStorage:
        """Map a storage, on this worker's device also where it is another one's.

        Raises:
            UnavailableError: The other device is not to be seen or read from here, the driver
                refuses the handle, or its allocation is smaller than the storage.
        """
        self._check_reachable(device)
        try:
            # Without the name of a count, PyTorch finds none to lower when the mapping goes; and
            # no event, since a writer has waited for its stream before it names a block.
            storage = torch.UntypedStorage._new_shared_cuda(  # noqa: SLF001
                self._index, handle.key, handle.size, handle.offset, b"", 0, b"", False
            )
        except RuntimeError as error:
            raise UnavailableError(f"its memory cannot be opened ({_line(error)})") from None
        if handle.size > _bytes_from(storage.data_ptr()):
            raise UnavailableError("its memory is smaller than it says")
        return storage

    def _check_reachable(self, device: str) -> None:
        """Refuse beforehand what would fail in a kernel, and take the process with it."""
        for index in range(torch.cuda.device_count()):
            if _uuid(index) == device:
                if index == self._index or torch.cuda.can_device_access_peer(self._index, index):
                    return
                raise UnavailableError("this device has no peer access to the other one")
        raise UnavailableError("the other device is not visible to this process")


def _bytes_from(address: int) -> int:
    """Return how many bytes an allocation has from an address on, 0 where the driver cannot say."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    status = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2(
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
    )
    return 0 if status else base.value + size.value - address


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
