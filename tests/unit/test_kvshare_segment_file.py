"""A segment's file: it comes back bit for bit, or not at all, and costs no memory before that."""

import json
import os
import resource
import signal
import stat
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import (
    PLANTS,
    SHAPE,
    bits,
    plant,
    put_file,
    random_kv,
    same_label,
    some_label,
)
from vllm_plugins.kv_connectors.kvshare import segment_file
from vllm_plugins.kv_connectors.kvshare.segment_file import DamagedFileError, KVShape

LARGE = 1 << 30


def read_kv(path, key=5, shape=SHAPE, most=LARGE):
    return segment_file.read_kv(path, key, shape, most, pinned=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "previous"), [(1, None), (40, 3), (777, 2**62)])
def test_a_segment_comes_back_as_it_was_written(tmp_path, dtype, tokens, previous):
    shape = KVShape(2, 3, 8, dtype)
    path = tmp_path / "5.safetensors"
    label, kv = some_label(tokens, previous=previous), random_kv(tokens, shape)
    put_file(path, 5, label, kv)
    assert same_label(segment_file.read_label(path, 5), label)
    back = read_kv(path, 5, shape)
    assert back.dtype == dtype
    assert back.shape == kv.shape
    assert bits(back) == bits(kv)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_what_safetensors_itself_reads(tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / "5.safetensors"
    label, kv = put_file(path)
    arrays = load_file(path)
    assert set(arrays) == {"anchor_hashes", "anchor_offsets", "tokens", "kv"}
    assert bits(arrays["kv"]) == bits(kv)
    assert arrays["tokens"].tolist() == label.tokens.tolist()
    assert arrays["anchor_hashes"].tolist() == label.anchors.hashes.tolist()


def test_kv_of_a_step_in_inference_mode_can_be_written(tmp_path):
    with torch.inference_mode():
        kv = random_kv(16) + 1
    put_file(tmp_path / "5.safetensors", kv=kv)
    assert bits(read_kv(tmp_path / "5.safetensors")) == bits(kv)


def test_any_flipped_bit_is_noticed(tmp_path):
    """In every byte of a small file: what is used of it is covered by a checksum or compared."""
    path = tmp_path / "5.safetensors"
    label, _ = put_file(path, label=some_label(8))
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position)
            with pytest.raises(DamagedFileError):
                read_kv(path)
            try:
                found = segment_file.read_label(path, 5)
            except DamagedFileError:
                pass
            else:
                # In the KV, which is not looked at here.
                assert position >= len(whole) - 8 * SHAPE.bytes_per_token
                assert same_label(found, label)
            os.pwrite(file.fileno(), bytes([byte]), position)
    read_kv(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_other_damage_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "5.safetensors"
    put_file(path)
    whole = path.read_bytes()
    damaged = data.draw(
        st.one_of(
            st.integers(0, len(whole) - 1).map(lambda n: whole[:n]),
            st.binary(min_size=1, max_size=64).map(lambda extra: whole + extra),
            st.binary(max_size=300),
            st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=40)).map(
                lambda cut: whole[: cut[0]] + cut[1] + whole[cut[0] :]
            ),
        )
    )
    path.write_bytes(damaged)
    with pytest.raises(DamagedFileError):
        read_kv(path)


def with_header(path, change):
    """Rewrite a file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def huge(header):
    """Consistent in itself, and of terabytes."""
    shape = [SHAPE.layers, 2, 1 << 20, SHAPE.kv_heads, 1 << 16]
    tensors = segment_file._tensors(2, 1 << 20, "BF16", shape)
    return {"__metadata__": header["__metadata__"], **tensors}


HEADERS = {
    "huge sizes": huge,
    "overlapping arrays": lambda h: h["kv"].update(data_offsets=[0, h["kv"]["data_offsets"][1]]),
    "negative sizes": lambda h: h["tokens"].update(shape=[-16]),
    "sizes that are no integers": lambda h: h["tokens"].update(shape=[16.0]),
    "sizes that are true": lambda h: h["kv"]["shape"].__setitem__(1, True),
    "sizes that are text": lambda h: h["kv"].update(shape="22222"),
    "an endless number": lambda h: b'{"tokens": {"shape": [' + b"9" * 5000 + b"]}}",
    "another type": lambda h: h["kv"].update(dtype="F16"),
    "an unknown type": lambda h: h["kv"].update(dtype="F8"),
    "a type that is a list": lambda h: h["kv"].update(dtype=["BF16"]),
    "another order": lambda h: h["kv"].update(shape=h["kv"]["shape"][::-1]),
    "no label": lambda h: h.pop("__metadata__") and None,
    "a label that is a list": lambda h: h.update(__metadata__=[1]),
    "a label of numbers": lambda h: h.update(__metadata__={"segment": 5, "crc32": 6}),
    "an array more": lambda h: h.update(more=h["tokens"]),
    "an array less": lambda h: h.pop("tokens") and None,
    "a list": lambda h: [h],
    "a number": lambda h: 5,
    "no text": lambda h: b"\xff\xfe" * 50,
    "no JSON": lambda h: b"{" * 500,
    "deep nesting": lambda h: b"[" * 60_000,
    "nothing": lambda h: b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_says_something_else_is_refused(tmp_path, name):
    path = tmp_path / "5.safetensors"
    put_file(path)
    with_header(path, HEADERS[name])
    for read in (read_kv, lambda path: segment_file.read_label(path, 5)):
        with pytest.raises(DamagedFileError):
            read(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 16, 1 << 30, 2**63, 2**64 - 1])
def test_a_header_of_any_declared_length_takes_no_memory(tmp_path, length):
    path = tmp_path / "5.safetensors"
    put_file(path)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedFileError):
        read_kv(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_file_with_a_hole_of_terabytes_takes_no_memory(tmp_path):
    path = tmp_path / "5.safetensors"
    put_file(path)
    size = path.stat().st_size
    with_header(path, huge)
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        file.truncate(8 + length + header["kv"]["data_offsets"][1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for most in (size, 1 << 62):
        with pytest.raises(DamagedFileError):
            read_kv(path, most=most)
    with pytest.raises(DamagedFileError):
        segment_file.read_label(path, 5)
    # The token ids, whose length the file really has, are the most that is read.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_file_larger_than_what_was_written_is_not_read(tmp_path):
    path = tmp_path / "5.safetensors"
    put_file(path)
    read_kv(path, most=path.stat().st_size)
    with pytest.raises(DamagedFileError, match="larger"):
        read_kv(path, most=path.stat().st_size - 1)


@pytest.mark.parametrize(
    "shape",
    [
        KVShape(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_size, torch.float16),
        KVShape(SHAPE.layers, SHAPE.head_size, SHAPE.kv_heads, SHAPE.dtype),
        KVShape(SHAPE.layers + 1, SHAPE.kv_heads, SHAPE.head_size, SHAPE.dtype),
    ],
)
def test_kv_of_another_shape_or_type_is_refused(tmp_path, shape):
    path = tmp_path / "5.safetensors"
    put_file(path)
    with pytest.raises(DamagedFileError, match="holds KV of"):
        read_kv(path, shape=shape)


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "5.safetensors"
    monkeypatch.setattr(segment_file, "FORMAT_VERSION", 2)
    put_file(path)
    monkeypatch.undo()
    with pytest.raises(DamagedFileError, match="another version"):
        read_kv(path)


def test_another_segments_file_under_the_name_is_refused(tmp_path):
    put_file(tmp_path / "6.safetensors", key=6)
    (tmp_path / "6.safetensors").rename(tmp_path / "5.safetensors")
    with pytest.raises(DamagedFileError, match="another segment"):
        read_kv(tmp_path / "5.safetensors")


@pytest.mark.parametrize("kind", PLANTS)
def test_what_is_no_file_of_ours_is_not_read(tmp_path, kind):
    path = tmp_path / "5.safetensors"
    plant(kind, path, tmp_path / "elsewhere")
    for read in (read_kv, lambda path: segment_file.read_label(path, 5)):
        with pytest.raises((DamagedFileError, OSError)):
            read(path)


def test_a_real_write_that_fails_half_way_leaves_nothing(tmp_path):
    """The file size limit of the process takes the place of a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            put_file(tmp_path / "5.safetensors", label=some_label(400))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
