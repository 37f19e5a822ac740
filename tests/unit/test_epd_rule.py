"""The rule of early prefill, against brute force: what is scheduled never needs what is missing."""

import itertools

import pytest

from tests.epd_sides import request
from vllm_plugins.kv_connectors.epd.early_prefill import can_go_on

ITEMS = request("r", ["a", "b", "c"]).mm_features
# Items stand at 2, 8 and 14, each of 4 tokens.


@pytest.mark.parametrize("missing", [m for n in range(4) for m in itertools.combinations("abc", n)])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_request_goes_on_where_it_has_a_token_before_the_next_missing_item(missing, lookahead):
    for computed in range(20):
        ahead = [
            f for f in ITEMS if f.identifier in missing and f.mm_position.offset + 4 > computed
        ]
        limit = ahead[0].mm_position.offset if ahead else 100
        can = can_go_on(
            ITEMS, lambda i: ITEMS[i].identifier in missing, computed, lookahead, early=True
        )
        # vLLM cuts the chunk at the limit, less the look-ahead; without a token it must not try.
        assert can == (limit - (computed + lookahead) > 0)


def test_without_early_prefill_it_waits_for_all_that_is_ahead():
    for computed in range(20):
        can = can_go_on(ITEMS, lambda i: i == 1, computed, 0, early=False)
        assert can == (computed >= 12)


def test_without_items_it_always_goes_on():
    assert can_go_on([], lambda i: True, 0, 0, early=False)
