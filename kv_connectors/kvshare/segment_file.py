"""One stored segment as a file: its KV in one worker, and what the index knows of it.

A file is in safetensors format, with the small arrays in front of the KV, so that an index can be
refilled without reading any KV. Nothing in a file is believed: its sizes are compared with the
file's own before anything is allocated, and checksums cover every byte that is used.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_plugins.kv_connectors.kvshare.anchors import Anchors
from vllm_plugins.kv_connectors.kvshare.transfer import Label

FORMAT_VERSION = 1

# A header takes about a kilobyte, and no segment comes near this many tokens.
MOST_HEADER_BYTES, MOST_TOKENS = 1 << 16, 1 << 20

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class DamagedFileError(Exception):
    """A file is not a segment as it was written."""


@dataclass(frozen=True)
class KVShape:
    """Sizes of KV in one worker.

    Attributes:
        layers: Attention layers.
        kv_heads: Heads of keys and values that this rank holds.
        head_size: Elements of a head.
        dtype: Type of an element.
    """

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size * self.dtype.itemsize

    def of(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Return the shape of a segment: (layers, 2, tokens, kv heads, head size)."""
        return self.layers, 2, tokens, self.kv_heads, self.head_size


def write(path: Path, key: int, label: Label, kv: torch.Tensor) -> int:
    """Write a segment; the file is there complete or not at all.

    There is no fsync: what a failing machine leaves unwritten does not pass its checksum.

    Args:
        path: Where.
        key: The segment.
        label: What the index knows of it.
        kv: Contiguous in host memory, shape (layers, 2, tokens, kv heads, head size).

    Returns:
        The file's size in bytes.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    arrays, data = _arrays(label), _bytes_of(kv)
    form = [DTYPE_NAMES[kv.dtype], *kv.shape]
    facts = json.dumps(_facts(key, label, form, zlib.crc32(data)))
    tensors = _tensors(len(label.anchors), len(label.tokens), form[0], kv.shape)
    metadata = {"segment": facts, "crc32": str(_checksum(facts, arrays))}
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with FileIO(os.open(temporary, flags, 0o600), "w") as file:
            for part in (len(header).to_bytes(8, "little"), header, arrays, data):
                _write_all(file, memoryview(part))
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return 8 + len(header) + len(arrays) + len(data)


def read_label(path: Path, key: int) -> Label:
    """Return what a file says of a segment, without reading its KV.

    Raises:
        DamagedFileError: The file is not that segment's, as it was written.
        OSError: It cannot be read.
    """
    with _opened(path) as file:
        return _read_label(file, _read_header(file), key)[0]


def read_kv(path: Path, key: int, shape: KVShape, most: int, pinned: bool) -> torch.Tensor:
    """Return a segment's KV.

    Args:
        path: Its file.
        key: The segment.
        shape: Sizes that the KV must have.
        most: Largest size of the file, in bytes; a larger one is not read.
        pinned: Whether to return it in page-locked memory.

    Returns:
        Shape (layers, 2, tokens, kv heads, head size), in host memory.

    Raises:
        DamagedFileError: The file is not that segment's, as it was written.
        OSError: It cannot be read.
    """
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise DamagedFileError("is larger than what was written")
        header = _read_header(file)
        label, checksum = _read_label(file, header, key)
        expected = (DTYPE_NAMES[shape.dtype], shape.of(len(label.tokens)))
        if (header.dtype, header.shape) != expected:
            raise DamagedFileError(f"holds KV of {header.dtype} {header.shape}, not {expected}")
        kv = torch.empty(expected[1], dtype=shape.dtype, pin_memory=pinned)
        data = _bytes_of(kv)
        _read_all(file, data)
        if zlib.crc32(data) != checksum:
            raise DamagedFileError("has another checksum than its KV")
        return kv


@dataclass(frozen=True)
class _Header:
    """What the front of a file declares; its sizes are those of the file."""

    metadata: dict[str, Any]
    anchors: int
    tokens: int
    dtype: str
    shape: tuple[int, ...]


def _tensors(anchors: int, tokens: int, dtype: str, shape: Sequence[int]) -> dict[str, Any]:
    """Return the safetensors header of a file's arrays, in the order in which they follow it."""
    itemsize = {name: kind.itemsize for kind, name in DTYPE_NAMES.items()}[dtype]
    elements = 1
    for size in shape:
        elements *= size
    entries: dict[str, Any] = {}
    offset = 0
    for name, kind, dimensions, size in (
        ("anchor_hashes", "U64", [anchors], 8 * anchors),
        ("anchor_offsets", "I64", [anchors], 8 * anchors),
        ("tokens", "I32", [tokens], 4 * tokens),
        ("kv", dtype, list(shape), itemsize * elements),
    ):
        end = offset + size
        entries[name] = {"dtype": kind, "shape": dimensions, "data_offsets": [offset, end]}
        offset = end
    return entries


def _facts(key: int, label: Label, form: list[Any], checksum: int) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "key": key,
        "domain": label.domain.hex(),
        "content": label.content.hex(),
        "context": label.context.hex(),
        "position": int(label.position),
        "generation": int(label.generation),
        "source": label.source,
        "previous": label.previous,
        "kv": form,
        "kv_crc32": checksum,
    }


def _arrays(label: Label) -> bytes:
    """Return the arrays of a label, as they stand in front of the KV."""
    anchors = label.anchors
    return b"".join(
        np.ascontiguousarray(values, dtype=dtype).tobytes()
        for values, dtype in (
            (anchors.hashes, "<u8"),
            (anchors.offsets, "<i8"),
            (label.tokens, "<i4"),
        )
    )


def _checksum(facts: str, arrays: bytes) -> int:
    return zlib.crc32(arrays, zlib.crc32(facts.encode()))


def _bytes_of(kv: torch.Tensor) -> memoryview:
    """Return a view of a contiguous tensor's memory."""
    return memoryview(kv.view(-1).view(torch.uint8).numpy())


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    # Opening a pipe would wait for its other end.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFileError("is not a regular file")
    with FileIO(descriptor, "r") as file:
        yield file


def _read_header(file: FileIO) -> _Header:
    """Read a file's header and make sure that the file is as long as it declares."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read_bytes(file, 8), "little")
    if length > min(MOST_HEADER_BYTES, size - 8):
        raise DamagedFileError(f"declares a header of {length} bytes")
    try:
        header = json.loads(_read_bytes(file, length))
        metadata = header.pop("__metadata__")
        tokens, anchors = header["tokens"]["shape"][0], header["anchor_hashes"]["shape"][0]
        dtype, shape = header["kv"]["dtype"], tuple(header["kv"]["shape"])
        counts = [tokens, anchors, *shape]
        if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts):
            raise DamagedFileError("declares sizes that no segment has")
        expected = _tensors(anchors, tokens, dtype, shape)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError("has no header of a segment") from None
    if header != expected or 8 + length + expected["kv"]["data_offsets"][1] != size:
        raise DamagedFileError("is not as long as it declares")
    return _Header(metadata, anchors, tokens, dtype, shape)


def _read_label(file: FileIO, header: _Header, key: int) -> tuple[Label, int]:
    """Return a file's label, and the checksum that its KV must have."""
    k, n = header.anchors, header.tokens
    arrays = _read_bytes(file, 16 * k + 4 * n)
    try:
        text = header.metadata["segment"]
        if int(header.metadata["crc32"]) != _checksum(text, arrays):
            raise DamagedFileError("has another checksum than its label")
        facts = json.loads(text)
        if facts["version"] != FORMAT_VERSION or facts["key"] != key:
            raise DamagedFileError("is of another version or another segment")
        if facts["kv"] != [header.dtype, *header.shape]:
            raise DamagedFileError("has KV of another form than its label says")
        label = Label(
            domain=bytes.fromhex(facts["domain"]),
            tokens=np.frombuffer(arrays, "<i4", n, 16 * k).copy(),
            content=bytes.fromhex(facts["content"]),
            context=bytes.fromhex(facts["context"]),
            position=facts["position"],
            generation=facts["generation"],
            source=facts["source"],
            previous=facts["previous"],
            anchors=Anchors(
                np.frombuffer(arrays, "<u8", k).copy(),
                np.frombuffer(arrays, "<i8", k, 8 * k).copy(),
            ),
        )
        return label, facts["kv_crc32"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError("has no label of a segment") from None


def _read_bytes(file: FileIO, size: int) -> bytes:
    data = bytearray(size)
    _read_all(file, memoryview(data))
    return bytes(data)


def _read_all(file: FileIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise DamagedFileError("is truncated")
        done += count


def _write_all(file: FileIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]
