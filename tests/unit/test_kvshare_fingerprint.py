"""The fingerprint names what KV depends on, and nothing else."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_plugins.kv_connectors.kvshare.fingerprint import fingerprint


def engine(folder, **changes):
    facts = {
        "model": str(folder), "revision": None, "dtype": torch.bfloat16, "quantization": None,
        "hf": {"layers": 3, "transformers_version": "5.0"}, "load_format": "auto",
        "cache_dtype": "auto", "tp": 1, "dp": 0, "block": 16,
    } | changes  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(
            **{name: facts[name] for name in ("model", "revision", "dtype", "quantization")},
            hf_config=SimpleNamespace(to_dict=lambda: dict(facts["hf"])),
        ),
        load_config=SimpleNamespace(load_format=facts["load_format"]),
        cache_config=SimpleNamespace(cache_dtype=facts["cache_dtype"], block_size=facts["block"]),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=facts["tp"], data_parallel_index=facts["dp"]
        ),
    )


OPTIONS = SimpleNamespace(min_run=32, chunk_max=512)


def test_the_fingerprint_tells_apart_whose_kv_differs(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    base = fingerprint(engine(tmp_path), OPTIONS)
    assert base == fingerprint(engine(tmp_path), OPTIONS)
    assert len(base) == 32
    changes = [
        {"model": "other"}, {"revision": "x"}, {"dtype": torch.float16}, {"quantization": "fp8"},
        {"hf": {"layers": 4}}, {"load_format": "dummy"}, {"cache_dtype": "float16"}, {"tp": 2},
        {"dp": 1},
    ]  # fmt: skip
    prints = [fingerprint(engine(tmp_path, **change), OPTIONS) for change in changes]
    prints.append(fingerprint(engine(tmp_path), SimpleNamespace(min_run=64)))
    (tmp_path / "model.safetensors").write_text("other weights")
    prints.append(fingerprint(engine(tmp_path), OPTIONS))
    assert len({base, *prints}) == len(changes) + 3


def test_the_fingerprint_is_the_same_where_kv_is(tmp_path):
    base = fingerprint(engine(tmp_path), OPTIONS)
    other = engine(tmp_path, block=32, hf={"transformers_version": "6.0", "layers": 3})
    assert fingerprint(other, SimpleNamespace(min_run=32, chunk_max=64)) == base
