"""ZipCache with keys in bases of their own, on the real engine: how they are found, and used."""

import pytest
import torch

from tests.engine.test_zipcache import BLOCK, PROMPTS, assert_idle, engine, greedy, life, one_by_one
from tests.models import make_engine, tiny_llama, worker_of
from vllm_plugins.attention_backends.zipcache import key_transform, quantiser, train
from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransformFile
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.errors import PluginError

pytestmark = pytest.mark.engine

LAYERS = 4
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
# Two windows, of three whole blocks and a bit.
WINDOWS = [PROMPTS[-1][:200], PROMPTS[-1][300:500]]


def counting_engine(**arguments):
    sizes = {"max_model_len": 201, "max_num_batched_tokens": 201, "max_num_seqs": 1}
    return make_engine(tiny_llama(layers=LAYERS), enable_prefix_caching=False, **sizes, **arguments)


def computed(tokens):
    """Keys of each layer as transformers computes them, shape (tokens, kv heads, D)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama(layers=LAYERS), dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    return [layer.keys[0].transpose(0, 1) for layer in cache.layers]


@pytest.fixture(scope="module")
def moments():
    with counting_engine() as llm:
        return train.count(llm, WINDOWS)


@pytest.fixture(scope="module")
def file(moments, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.safetensors"
    fitted = {
        name: (key_transform.fit(x.spread, x.queries), x.keys / x.tokens)
        for name, x in moments.items()
    }
    key_transform.write(path, fitted, "tiny")
    return str(path)


@pytest.fixture(scope="module")
def stock(file):
    with engine() as llm:
        return [greedy(llm, [p])[0] for p in PROMPTS]


@pytest.fixture(scope="module")
def packed(stock, file):
    with engine({"key_transform": file}) as llm:
        yield llm


def test_what_is_counted_is_what_attention_is_given(moments):
    assert list(moments) == NAMES
    whole = [[x[: 3 * BLOCK] for x in computed(window)] for window in WINDOWS]
    for name, *keys in zip(NAMES, *whole, strict=True):
        found, blocks = moments[name], torch.cat(keys).double().unflatten(0, (-1, BLOCK))
        assert found.tokens == 6 * BLOCK
        torch.testing.assert_close(found.keys, blocks.sum((0, 1)), rtol=1e-4, atol=1e-4)
        around = (blocks - blocks.mean(1, keepdim=True)).flatten(0, 1)
        spread = torch.einsum("nkd,nke->kde", around, around)
        torch.testing.assert_close(found.spread, spread, rtol=1e-3, atol=1e-4)
        assert (torch.linalg.eigvalsh(found.queries) > -1e-9).all()


@pytest.mark.slow
def test_ranks_count_their_own_heads(moments):
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with counting_engine(**parallel) as llm:
        found = train.count(llm, WINDOWS)
    assert list(found) == NAMES
    for name, wanted in moments.items():
        assert found[name].tokens == wanted.tokens
        for part in ("spread", "queries", "keys"):
            ours, whole = getattr(found[name], part), getattr(wanted, part)
            torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-3)


def test_what_is_not_packed_yet_answers_as_stock(packed, stock):
    """Within a block, and the first token after a prompt in one chunk."""
    for prompt, wanted in zip(PROMPTS, stock, strict=True):
        count = max(BLOCK - len(prompt), 1)
        assert greedy(packed, [prompt], count)[0] == wanted[:count]
    assert_idle(packed)


def test_pages_hold_keys_in_their_bases(packed, file):
    """Within half a step of the layer's own keys, which transformers computes."""
    prompt = PROMPTS[-1][: 2 * BLOCK + 5]
    cache = [x.view(torch.uint8) for x in worker_of(packed).model_runner.kv_caches]
    before = [x.clone() for x in cache]
    greedy(packed, [prompt], 2)
    page = PageFormat.of(BLOCK, 32, "4/2", 0.2, 1.0)
    for name, keys, now, then in zip(NAMES, computed(prompt), cache, before, strict=True):
        [first, *_] = (now != then).flatten(1).any(1).nonzero().flatten().tolist()
        codes, salient = quantiser.read_page(now[first].flatten(1), page)
        found, _ = quantiser.dequantise(codes, salient)
        by = KeyTransformFile(file).layer(name, 2, slice(2), 32, torch.float32)
        own = [x.transpose(0, 1) for x in keys.split(BLOCK)[:2]]
        bound = 0.51 * codes.k_step.float()[:, None] + 1e-4
        wanted = [x @ by.keys - by.centre[:, None] for x in own]
        inside = [((found - x).abs() <= bound).all() for x in wanted]
        assert any(inside) and not any(((found - x).abs() <= bound).all() for x in own)
    assert_idle(packed)


def test_a_batch_answers_as_each_request_alone(packed):
    alone = one_by_one(packed)
    assert greedy(packed, PROMPTS) == alone
    assert life(packed).sealed["prompt"] > 0 < life(packed).sealed["decode"]
    assert_idle(packed)


def test_a_hit_of_the_prefix_cache_reads_what_was_sealed(packed):
    prompt = [*PROMPTS[-1][: 12 * BLOCK], 5]
    greedy(packed, [prompt], 1)
    # The next one reads all of its blocks, and so does who comes after it.
    answer = greedy(packed, [prompt])
    assert greedy(packed, [prompt]) == answer
    assert_idle(packed)


def test_another_models_file_is_refused(packed, file, tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    packed.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    eye = torch.eye(32).expand(2, 32, 32)
    path = tmp_path / "keys.safetensors"
    key_transform.write(path, {NAMES[0]: (eye, torch.zeros(2, 32))}, "another")
    mend = r"has no model\.layers\.1\.self_attn\.attn\.matrix; make one"
    with pytest.raises(PluginError, match=mend), engine({"key_transform": str(path)}):
        pass


@pytest.mark.slow
def test_ranks_in_processes_of_their_own_answer_alike(packed, file):
    """Each reads the bases of its own heads."""
    from vllm.distributed import cleanup_dist_env_and_memory

    packed.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    with engine({"key_transform": file}) as llm:
        alone = [greedy(llm, [prompt], 20)[0] for prompt in PROMPTS[-3:]]
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine({"key_transform": file}, served_model_name="ranks", **parallel) as llm:
        assert [greedy(llm, [prompt], 20)[0] for prompt in PROMPTS[-3:]] == alone
