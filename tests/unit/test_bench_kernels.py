"""``vllm-plugins bench --kernel``: small layers on this machine, and what it refuses."""

import argparse
import json
from types import SimpleNamespace

import pytest

from vllm_plugins.attention_backends.zipcache.page import BLOCK_SIZES
from vllm_plugins.cli import bench_kernel
from vllm_plugins.cli.main import main

SHAPE = ("--heads", "4", "--kv-heads", "2", "--head-size", "64", "--repeats", "2", "--no-plot")


@pytest.mark.parametrize(
    ("plugin", "phase", "names"),
    [
        (
            "hip:top_k=256",
            "decode",
            ["stock", "hip dense", "hip, all stages", "hip, selection kept", "hip"],
        ),
        ("hip:top_k=256,dense_threshold=0", "prefill", ["stock", "hip dense", "hip"]),
        ("zipcache", "decode", ["stock", "zipcache", "zipcache, seal one block"]),
    ],
)
def test_times_stand_beside_stocks(tmp_path, capsys, plugin, phase, names):
    words = ["bench", "--kernel", plugin, "--phase", phase, "--contexts", "2048"]
    assert main([*words, *SHAPE, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [x["name"] for x in result["times"]] == names
    for x in result["times"]:
        assert len(x["seconds"]) == 2 and min(x["seconds"]) > 0
        assert x["load"] == {"phase": phase, "context": 2048, "batch": 1}
    # Two kv heads of 64 channels, keys and values, float32.
    assert result["times"][0]["bytes"] == 2048 * 2 * 2 * 64 * 4
    assert "GB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--kernel", "sarathi"), "has no attention kernels to time"),
        (("--kernel", "hip:top_k=3"), "is not a multiple of the last chunk"),
        (("--kernel", '["hip", "zipcache"]'), "is an attention backend, and so is 'hip'"),
        (("--kernel", '["hip", "spf"]'), "names several plug-ins"),
        (("--kernel", "zipcache", "--phase", "prefill"), "a prompt in one chunk reads no page"),
        (("--kernel", "hip", "--phase", "prefill", "--batches", "2"), "at batch 1"),
        (("--kernel", "hip:dense_layers=[8]"), "layer 8 is dense"),
        (("--kernel", "hip", "--heads", "9"), "unequal numbers of query heads"),
        ((), "name a plug-in and a --model"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_line(tmp_path, capsys, words, reason):
    words = ["bench", *SHAPE, "--contexts", "2048", *words, "--out", str(tmp_path)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_of_the_default_size_can_be_packed(device, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(device_type=device))
    words = argparse.Namespace(heads=4, kv_heads=2, head_size=64, block_size=None, dtype=None)
    assert bench_kernel._shape(words).block_size in BLOCK_SIZES
