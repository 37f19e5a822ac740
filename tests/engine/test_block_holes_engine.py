"""Layers that see holes, on the real engine: what a plug-in relies on beside equal answers."""

import pytest
import torch

from tests.engine.dynamic_llava_engine import BLOCK, Ask, assert_idle, pruned
from tests.models import scheduler_of, worker_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm():
    with pruned() as engine:
        yield engine


def view_of(llm):
    return worker_of(llm).model_runner.get_model().hole_view


def groups_of(llm):
    return worker_of(llm).plugin_view().attention_groups


def test_layers_that_see_holes_have_a_builder_of_their_own_in_the_same_table(llm):
    [groups] = groups_of(llm)
    names = [type(group.metadata_builders[0]).__name__ for group in groups]
    assert [len(group.layer_names) for group in groups] == [2, 2]
    assert sum(name.startswith("Hole") for name in names) == 1
    [builder] = view_of(llm).builders
    assert len(builder.hole_flags) == worker_of(llm).model_runner.kv_cache_config.num_blocks


def order_of(llm, step):
    """Names of a step's requests, in its order."""
    runner = worker_of(llm).model_runner
    if worker_of(llm).plugin_config.use_v2_model_runner:
        names = [runner.req_states.index_to_req_id[row] for row in step.req_idx.tolist()]
    else:
        names = runner.input_batch.req_ids
    return [name.partition("-")[0] for name in names]


def held(llm):
    [request] = scheduler_of(llm).running
    [blocks] = scheduler_of(llm).kv_cache_manager.get_block_ids(request.request_id)
    return torch.tensor(blocks)


def test_flags_are_the_hole_and_go_with_the_next_write(llm):
    from vllm import SamplingParams

    engine, [flags] = llm.llm_engine, view_of(llm).flags.values()
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    # Over 7 to 151: blocks 1 to 3 are the hole.
    engine.add_request("a", Ask(7, (0,), 9).prompt, params)
    engine.step()
    blocks = held(llm)
    assert flags[blocks].nonzero().flatten().tolist() == [1, 2, 3]
    for _ in range(35):
        engine.step()
    assert len(held(llm)) > len(blocks)
    assert flags[held(llm)].nonzero().flatten().tolist() == [1, 2, 3]
    engine.abort_request(["a"])
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)
    # Freed blocks go round; whoever gets them writes them before reading them.
    engine.add_request("b", Ask(150, (), 9).prompt, params)
    engine.step()
    flags[held(llm)] = True
    engine.abort_request(["b"])
    engine.step()
    engine.add_request("c", Ask(150, (), 9, start=8).prompt, params)
    engine.step()
    assert not flags[held(llm)].any()
    engine.abort_request(["c"])
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)


def test_what_upper_layers_see_is_shorter_by_whole_blocks(llm):
    from vllm import SamplingParams

    engine, [builder] = llm.llm_engine, view_of(llm).builders
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    asks = [Ask(7, (0,), 9), Ask(50, (), 2), Ask(3, (1, 2), 4)]
    for i, ask in enumerate(asks):
        engine.add_request(f"{i}", ask.prompt, params)
    for _ in range(4):
        engine.step()
    step = builder.hole_step
    assert step.num_reqs == 3 and step.max_query_len == 1
    with torch.inference_mode():
        seen = builder.hole_compact(step)
    hidden = (step.seq_lens - seen.seq_lens) // BLOCK
    assert (hidden * BLOCK == step.seq_lens - seen.seq_lens).all()
    found = dict(zip(order_of(llm, step), hidden.tolist(), strict=True))
    assert found["1"] == 0 and found["0"] == 3 and found["2"] >= 6
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)


def test_a_step_reads_where_each_requests_media_are(llm):
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for i, ask in enumerate([Ask(7, (0,), 9), Ask(50, (), 2), Ask(3, (1, 2), 4)]):
        engine.add_request(f"{i}", ask.prompt, params)
    engine.step()
    [builder] = view_of(llm).builders
    runner = worker_of(llm).plugin_view()
    spans = dict(
        zip(
            order_of(llm, builder.hole_step),
            runner.media_spans(builder.hole_step),
            strict=True,
        )
    )
    assert spans == {"0": [(7, 151)], "1": [], "2": [(3, 147), (148, 292)]}
    lengths = runner.prompt_lengths(builder.hole_step).tolist()
    assert sorted(lengths) == [52, 161, 297]
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)
