import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_plugins.bench.metrics import (
    Slo,
    identical_share,
    meets,
    percentile_by_owner,
    read_trial,
    stall_gaps,
    summarise,
    summarise_stall,
    token_times,
)


def result(ttfts, itls, *, errors=None, starts=None, duration=10.0):
    n = len(ttfts)
    return {
        "ttfts": ttfts,
        "itls": itls,
        "errors": errors or [""] * n,
        "start_times": starts or [100.0 + i for i in range(n)],
        "input_lens": [10] * n,
        "output_lens": [len(gaps) + 1 for gaps in itls],
        "duration": duration,
        "generated_texts": [f"text {i}" for i in range(n)],
    }


# Five requests against TTFT 500 ms, TBT 100 ms: good; late first token; slow tokens; failed; one
# token only.
EXAMPLE = result(
    [0.2, 0.9, 0.3, 0.0, 0.5],
    [[0.05, 0.05], [0.01], [0.02, 0.3, 0.02], [], []],
    errors=["", "", "", "Internal Server Error", ""],
)
SLO = Slo(500, 100)


def test_goodput_of_the_hand_computed_example():
    trial = read_trial(EXAMPLE)
    ttft_met, tbt_met = meets(trial, SLO)
    assert ttft_met.tolist() == [True, False, True, False, True]
    assert tbt_met.tolist() == [True, True, False, False, True]
    summary = summarise(trial, SLO)
    assert summary["attainment"] == pytest.approx(2 / 5)
    assert summary["ttft_attainment"] == pytest.approx(3 / 5)
    assert summary["tbt_attainment"] == pytest.approx(3 / 5)
    assert summary["goodput"] == pytest.approx(0.2)
    assert (summary["requests"], summary["failed"]) == (5, 1)
    assert summary["requests_per_s"] == pytest.approx(0.4)
    # 3 + 2 + 4 + 1 tokens out; 4 answered prompts of 10.
    assert summary["output_tokens_per_s"] == pytest.approx(1.0)
    assert summary["total_tokens_per_s"] == pytest.approx(5.0)
    assert summary["ttft_p50_ms"] == pytest.approx(400)
    assert summary["tbt_p50_ms"] == pytest.approx(35)
    assert summary["tbt_max_ms"] == pytest.approx(300)


@pytest.mark.parametrize(("stat", "good"), [("max", False), ("p99", False), ("p50", True)])
def test_the_statistic_decides_whether_one_slow_token_spoils_a_request(stat, good):
    trial = read_trial(result([0.1], [[0.01] * 20 + [0.5]]))
    assert meets(trial, Slo(500, 100, stat))[1].tolist() == [good]


def test_p99_forgives_one_slow_token_among_very_many():
    trial = read_trial(result([0.1], [[0.01] * 200 + [0.5]]))
    assert meets(trial, Slo(500, 100, "p99"))[1].all()
    assert not meets(trial, Slo(500, 100, "max"))[1].any()


def test_a_target_met_exactly_is_met():
    trial = read_trial(result([0.5], [[0.125]]))
    assert summarise(trial, Slo(500, 125))["attainment"] == 1


def test_a_request_without_a_first_token_failed_even_without_an_error_text():
    trial = read_trial(result([0.0, 0.1], [[], []]))
    assert trial.failed.tolist() == [True, False]


def test_tokens_of_a_request_that_broke_off_do_not_count():
    trial = read_trial(result([0.1, 0.1], [[9.0], [0.1]], errors=["reset", ""]))
    assert trial.gap_s.tolist() == [0.1]
    assert trial.gap_owner.tolist() == [1]
    assert trial.output_tokens == 2


def test_without_an_answer_there_are_no_percentiles():
    summary = summarise(read_trial(result([0.0], [[]], errors=["boom"])), SLO)
    assert summary["goodput"] == 0
    assert np.isnan(summary["ttft_p50_ms"])
    assert np.isnan(summary["tbt_max_ms"])


@given(
    st.lists(st.lists(st.floats(0, 10), max_size=12), min_size=1, max_size=8),
    st.sampled_from([0, 50, 90, 99, 100]),
)
def test_percentiles_by_owner_are_numpys(groups, q):
    values = np.array([v for group in groups for v in group])
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    got = percentile_by_owner(values, owner, len(groups), q)
    for share, group in zip(got, groups, strict=True):
        if group:
            assert share == pytest.approx(np.percentile(group, q))
        else:
            assert np.isnan(share)


# Two decodes and a long prompt that is sent at 2.0 and gets its first token at 3.0.
STALL = result(
    [0.5, 0.5, 1.0],
    [[1.0, 0.6, 1.2, 0.1], [2.0, 0.9], [0.1]],
    starts=[0.0, 0.0, 2.0],
)
IS_LONG = np.array([False, False, True])


def test_token_times_start_at_each_requests_own_first_token():
    times = token_times(read_trial(STALL))
    assert times == pytest.approx([1.5, 2.1, 3.3, 3.4, 2.5, 3.4, 3.1])


def test_token_times_with_requests_of_one_token_at_the_end():
    trial = read_trial(result([0.5, 0.5, 0.5], [[1.0], [], []], starts=[0.0, 0.0, 0.0]))
    assert token_times(trial).tolist() == [1.5]


def test_only_decode_gaps_that_overlap_a_prefill_count_as_stalled():
    # Of the first decode: 1.5-2.1 and 2.1-3.3; of the second: 0.5-2.5 and 2.5-3.4.
    assert sorted(stall_gaps(read_trial(STALL), IS_LONG)) == pytest.approx([0.6, 0.9, 1.2, 2.0])


def test_stall_summary_says_how_many_decodes_outlasted_the_prefill():
    summary = summarise_stall(read_trial(STALL), IS_LONG)
    assert summary["stall_decodes"] == 2
    assert summary["stall_ttft_p50_ms"] == pytest.approx(1000)
    assert summary["stall_tbt_max_ms"] == pytest.approx(2000)
    ended = result([0.5, 0.5, 1.0], [[1.0, 1.2], [2.0, 0.9], [0.1]], starts=[0.0, 0.0, 2.0])
    assert summarise_stall(read_trial(ended), IS_LONG)["stall_decodes"] == 1


def test_identical_share_counts_whole_completions():
    assert identical_share(["a", "b", "c", "d"], ["a", "b", "x", "d"]) == 0.75
