"""Which rows of a span are computed beside the chosen ones."""

import numpy as np
import pytest

from vllm_plugins.kv_connectors.kvshare.blend import without_single_holes


@pytest.mark.parametrize(
    ("wanted", "filled"),
    [("1011", "1111"), ("1001", "1001"), ("0101", "0111"), ("0", "0"), ("10101", "11111")],
)
def test_a_row_between_two_wanted_ones_is_computed_with_them(wanted, filled):
    mask = np.array([letter == "1" for letter in wanted])
    assert "".join("01"[int(row)] for row in without_single_holes(mask)) == filled
