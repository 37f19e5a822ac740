"""The drafting benchmark's arithmetic, and vLLM's own EAGLE made of a drafter."""

import json

import pytest
from safetensors.torch import load_file

from tests.engine.specvlm_engine import drafter
from vllm_plugins.bench.drafting import Pass, _kv_bytes, _summary
from vllm_plugins.bench.drafting_engine import stock_eagle


def passed(seconds, answer=(1, 2, 3, 4, 5, 6, 7), rounds=2, steps=3, dropped=224):
    return Pass(seconds, [list(answer)], [306], [rounds], [steps], [dropped], 512)


def test_tokens_a_round_are_those_behind_the_first():
    found = _summary("pool", 5, [(passed(4.0), passed(2.0)), (passed(4.5), passed(3.0))])
    # Six tokens behind the first, in three steps, of which one had no draft.
    assert found.tokens_per_round == 2
    assert found.speedups == [2.0, 1.5]
    assert found.speedup == 1.75
    assert found.draft_rows == 306 - 224
    assert found.equal


def test_a_different_answer_is_told():
    assert not _summary("pool", 5, [(passed(1.0), passed(1.0, (1, 2)))]).equal


def test_bytes_of_the_drafters_cache():
    assert _kv_bytes(passed(1.0), 5) == 2 * 5 * (306 - 224 + 3) * 512
    assert _summary("ngram", 5, [(passed(1.0), passed(1.0))]).draft_kv_bytes == 0


def test_stock_eagle_has_the_layer_without_its_input_norm(tmp_path):
    stock_eagle(drafter(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"fc", "layers"}
    assert not any("input_layernorm" in name for name in weights)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "specvlm" not in config


def test_unknown_ways_are_refused(tmp_path):
    from vllm_plugins.bench.errors import BenchError
    from vllm_plugins.cli.bench_drafting import _read

    class Arguments:
        model, data, ways = "m", tmp_path / "data.json", "pool,best"

    with pytest.raises(BenchError, match="--ways best: known are ngram, eagle-text, off, pool"):
        _read(Arguments())
