"""The disk tier on the real engine: a restart, host memory smaller than the store, damage."""

import stat

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engine.kvshare_engine import (
    BLOCK,
    PROMPTS,
    assert_stock,
    prompt,
    served,
)
from vllm_plugins.errors import PluginError

pytestmark = pytest.mark.engine

NEUTRAL = "kvshare:recompute_min=1,recompute_max=1,fix_tokens_per_step=100"
EXACT = "kvshare:mode=exact_only"
# Of the tiny model: four layers, keys and values, two heads of 32, float32.
BYTES_PER_TOKEN = 4 * 2 * 2 * 32 * 4


def wait_until_written(engine, most=200):
    """Step until all that is stored is on disk."""
    payloads = engine.worker.kitchen.payloads
    for _ in range(most):
        engine.step_once()
        if set(engine.side.index) <= set(payloads._disk._sizes):
            return
    pytest.fail("not everything was written")


def files(folder):
    return sorted(folder.glob("*/rank0/*.safetensors"))


def test_what_was_stored_is_reused_after_a_restart(tmp_path, stock):
    with served(f"{EXACT},disk_path={tmp_path}") as engine:
        engine.greedy([prompt(0, 1, 2)])
        wait_until_written(engine)
        keys = set(engine.side.index)
        assert stat.S_IMODE(engine.worker._folder.stat().st_mode) == 0o700
    assert len(files(tmp_path)) == len(keys) > 0
    with served(f"{EXACT},disk_path={tmp_path}") as engine:
        assert set(engine.side.index) >= keys
        assert not len(engine.worker.kitchen.payloads)
        [output] = engine.greedy([PROMPTS[0]])
        assert output.num_cached_tokens >= len(PROMPTS[0]) - 2 * BLOCK
        assert_stock([output], stock[:1])
        # A new key is none of an earlier life's.
        engine.greedy([PROMPTS[3]])
        assert len(set(engine.side.index) - keys) > 0


def test_another_model_precision_does_not_find_it(tmp_path):
    with served(f"{EXACT},disk_path={tmp_path}") as engine:
        engine.greedy([prompt(0, 1, 2)])
        wait_until_written(engine)
    with served(f"{EXACT},disk_path={tmp_path}", dtype="bfloat16") as engine:
        assert not len(engine.side.index)
        [output] = engine.greedy([PROMPTS[0]])
        assert output.num_cached_tokens == 0


def test_host_memory_smaller_than_what_is_stored_only_costs_reads(tmp_path, stock):
    """Room for one prompt in memory, for all on disk."""
    host = 800 * BYTES_PER_TOKEN / 2**30
    with served(f"{NEUTRAL},disk_path={tmp_path},host_gib={host}") as engine:
        payloads = engine.worker.kitchen.payloads
        for p in PROMPTS:
            [output] = engine.greedy([p])
            assert payloads.bytes <= host * 2**30
            wait_until_written(engine)
        assert engine.side.index.used > 800
        reused = [engine.greedy([p])[0] for p in reversed(PROMPTS)]
        assert_stock(reused, stock[::-1])
        assert payloads.bytes <= host * 2**30
        del output


def test_a_reset_of_an_idle_engine_reaches_the_disk(tmp_path):
    with served(f"{EXACT},disk_path={tmp_path}") as engine:
        engine.greedy([prompt(0, 1, 2)])
        wait_until_written(engine)
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        # What the engine's own loop asks before it sleeps.
        assert engine.scheduler.has_requests()
        engine.llm.llm_engine.engine_core.engine_core.step()
        assert not engine.scheduler.has_requests()
    assert not files(tmp_path)


def test_damaged_files_are_computed_again(tmp_path, stock):
    with served(f"{NEUTRAL},disk_path={tmp_path}") as engine:
        engine.greedy([prompt(0, 1, 2)])
        wait_until_written(engine)
    damaged = files(tmp_path)
    # The last byte is KV: the label is found, the data not believed.
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with served(f"{NEUTRAL},disk_path={tmp_path}") as engine:
        assert len(engine.side.index) == len(damaged)
        assert_stock(engine.greedy([PROMPTS[1]]), stock[1:2])
        assert_stock(engine.greedy([PROMPTS[1]]), stock[1:2])
        engine.step_once()
    assert not set(files(tmp_path)) & set(damaged)


def test_two_engines_cannot_use_one_folder(tmp_path):
    from vllm_plugins.kv_connectors.kvshare.disk import Catalogue

    with served(f"{EXACT},disk_path={tmp_path}") as engine:
        folder = engine.worker._folder
        with pytest.raises(PluginError, match="another server with this model uses it"):
            Catalogue(folder.parent, folder.name)
    Catalogue(folder.parent, folder.name).close()
