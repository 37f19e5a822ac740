"""Requests whose images are metadata alone, on a model that accepts them (a tiny Qwen2-VL).

One colocated engine is both servers: it publishes an image, and then serves it without its pixels.
"""

import pytest
from vision import QWEN_END, QWEN_IMAGE, QWEN_START, tiny_qwen_vl

from tests.epd_engine import image, prefill_engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def both():
    with prefill_engine(model=tiny_qwen_vl(), role="colocated") as both:
        yield both


def serve(both, images, ids, params):
    from vllm import SamplingParams

    picture = [QWEN_START, QWEN_IMAGE, QWEN_END]
    prompt = {
        "prompt_token_ids": [20, 21, *picture * len(ids), 22],
        "multi_modal_data": {"image": images},
        "multi_modal_uuids": {"image": ids},
    }
    sampling = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, extra_args={"ec_transfer_params": params}
    )
    [output] = both.llm.generate([prompt], sampling, use_tqdm=False)
    return output


def metadata_of(params):
    import torch

    grids = [item["metadata"]["image_grid_thw"] for item in params.values()]
    return {"image_grid_thw": torch.tensor(grids)}


def test_an_image_is_served_from_its_metadata_and_its_embeddings(both):
    ids = ["one", "two"]
    publish = {"vllm_plugins_epd": {"publish": True}}
    whole = serve(both, [image(0, 84), image(1, 112)], ids, publish)
    params = whole.ec_transfer_params
    assert both.counter.items == 2
    assert [item["metadata"]["image_grid_thw"] for item in params.values()] == [
        [1, 6, 6],
        [1, 8, 8],
    ]
    both.empty_encoder_cache()
    again = serve(both, metadata_of(params), ids, params)
    assert again.prompt_token_ids == whole.prompt_token_ids
    assert again.outputs[0].token_ids == whole.outputs[0].token_ids
    assert both.counter.items == 2
    # The embeddings matter: another picture gives other tokens.
    both.empty_encoder_cache()
    other = serve(both, [image(2, 84), image(1, 112)], ["three", "two"], publish)
    assert other.outputs[0].token_ids != whole.outputs[0].token_ids


def test_metadata_without_embeddings_fails_its_request_alone(both):
    grid = {"one": {"metadata": {"image_grid_thw": [1, 6, 6]}}}
    lost = serve(both, metadata_of(grid), ["unknown"], {})
    assert lost.outputs[0].finish_reason == "error"
    assert serve(both, [image(0, 84)], ["four"], {}).outputs[0].finish_reason == "length"
