"""How a batch becomes query blocks."""

import dataclasses

import torch

from vllm_plugins.attention_backends.hip.batch import BatchPlanner, Rows
from vllm_plugins.attention_backends.hip.plugin import HipOptions
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, cut

BLOCK = 32


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows(requests):
    """Requests as (first position, tokens, whether they are of its prompt), each in pages 100 r."""
    lengths = ints(*(n for _, n, _ in requests))
    start = lengths.cumsum(0).to(torch.int32) - lengths
    table = torch.arange(len(requests), dtype=torch.int32)[:, None] * 100 + torch.arange(100)
    slots = [
        int(table[r, x // BLOCK]) * BLOCK + x % BLOCK
        for r, (position, n, _) in enumerate(requests)
        for x in range(position, position + n)
    ]
    return Rows(
        start=start,
        length=lengths,
        position=ints(*(p for p, _, _ in requests)),
        prefilling=torch.tensor([x for _, _, x in requests], dtype=torch.bool),
        block_table=table.to(torch.int32),
        slots=torch.tensor(slots, dtype=torch.int64),
        block_size=BLOCK,
    )


def planner(decode_queries=1, **values):
    return BatchPlanner(HipOptions(dense_threshold=100, **values), 8, decode_queries)


def test_blocks_are_cut_at_absolute_positions():
    whole = cut(ints(0), ints(300), ints(0), ints(5))
    assert whole.position.tolist() == [0, 64, 128, 192, 256]
    assert whole.length.tolist() == [64, 64, 64, 64, 44]
    assert whole.row.tolist() == [5] * 5
    chunk = cut(ints(7, 90), ints(83, 3), ints(50, 640), ints(0, 2))
    assert chunk.position.tolist() == [50, 64, 128, 640]
    assert chunk.length.tolist() == [14, 64, 5, 3]
    assert chunk.start.tolist() == [7, 21, 85, 90]
    assert chunk.row.tolist() == [0, 0, 0, 2]


def test_decodes_and_prompts_are_told_apart():
    decodes, prompts = planner().plan(rows([(0, 70, True), (200, 1, False), (60, 1, False)]))
    assert decodes.start.tolist() == [70, 71] and decodes.row.tolist() == [1, 2]
    # The shorter one is below the threshold.
    assert decodes.level.tolist() == [0, DENSE]
    assert prompts.position.tolist() == [0, 64] and prompts.level.tolist() == [DENSE, DENSE]


def test_a_decode_goes_on_with_what_was_kept_of_it_in_any_row():
    plan = planner().plan
    plan(rows([(200, 1, False), (400, 1, False)]))
    # Another request comes before them, and they change places; pages 100 r go with them here.
    later = rows([(201, 1, False), (401, 1, False)])
    decodes, _ = plan(later)
    assert decodes.level.tolist() == [3, 3]
    assert sorted(decodes.kept_row.tolist()) == [0, 1]


def test_a_one_token_chunk_of_a_prompt_is_no_decode():
    decodes, prompts = planner().plan(rows([(200, 1, True)]))
    assert len(decodes) == 0 and len(prompts) == 1


def test_drafts_belong_to_the_decode():
    decodes, prompts = planner(decode_queries=4).plan(rows([(200, 4, False), (300, 3, False)]))
    assert decodes.length.tolist() == [4, 3] and len(prompts) == 0
    # More than drafts can be is something else.
    decodes, prompts = planner(decode_queries=2).plan(rows([(200, 4, False)]))
    assert len(decodes) == 0 and prompts.length.tolist() == [4]


def test_sparse_prompts_keep_their_tail_dense():
    decodes, prompts = planner(phases="both", dense_tail_queries=64).plan(
        rows([(0, 320, True), (200, 1, False)])
    )
    assert prompts.position.tolist() == [0, 64, 128, 192, 256]
    assert prompts.level.tolist() == [DENSE, 0, 0, 0, DENSE]
    assert decodes.level.tolist() == [0]
    decodes, prompts = planner(phases="prefill", dense_tail_queries=0).plan(
        rows([(0, 320, True), (200, 1, False)])
    )
    assert prompts.level.tolist() == [DENSE, 0, 0, 0, 0]
    assert decodes.level.tolist() == [DENSE]


def test_a_batch_of_nothing():
    decodes, prompts = planner().plan(rows([]))
    assert len(decodes) == len(prompts) == 0


def test_a_first_token_has_no_token_before_it():
    """The last column of its block table may be anybody's."""
    options = HipOptions(dense_threshold=0, refresh=(64, 64, 64))
    plan = BatchPlanner(options, 8, 1).plan
    other = rows([(159, 1, False)])
    plan(other)
    both = rows([(0, 1, False), (160, 1, False)])
    table = torch.zeros_like(both.block_table)
    table[1], table[0, -1] = other.block_table[0], other.block_table[0, 159 // BLOCK]
    decodes, _ = plan(dataclasses.replace(both, block_table=table))
    assert decodes.level.tolist() == [0, 3]
