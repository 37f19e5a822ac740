import math

import numpy as np
import pytest

from vllm_plugins.bench.compare import (
    best,
    bootstrap_median,
    median_summary,
    paired_ratios,
)
from vllm_plugins.bench.metrics import Slo

SLO = Slo(1000, 100)


@pytest.mark.parametrize(("size", "least"), [(5, 0.90), (20, 0.92)])
def test_bootstrap_interval_covers_the_true_median_about_as_often_as_it_says(size, least):
    rng = np.random.default_rng(1)
    samples = rng.lognormal(mean=math.log(1.3), sigma=0.2, size=(400, size))
    intervals = [bootstrap_median(sample, resamples=1000) for sample in samples]
    covered = np.mean([i.low <= 1.3 <= i.high for i in intervals])
    assert least <= covered <= 0.99


def test_bootstrap_interval_narrows_with_more_pairs_and_repeats_itself():
    rng = np.random.default_rng(2)
    few, many = (bootstrap_median(rng.normal(1, 0.1, n)) for n in (8, 200))
    assert many.high - many.low < few.high - few.low
    data = rng.normal(1, 0.1, 10)
    assert bootstrap_median(data, seed=3) == bootstrap_median(data, seed=3)


def test_bootstrap_of_equal_values_is_that_value():
    interval = bootstrap_median([1.25] * 5)
    assert (interval.low, interval.median, interval.high) == (1.25, 1.25, 1.25)


def ratios(challenger, baseline):
    return {ratio.figure: ratio for ratio in paired_ratios(challenger, baseline)}


def test_ratios_are_paired_and_judged_by_the_direction_that_is_better():
    baseline = [{"goodput": g, "ttft_p99_ms": 100.0, "tbt_p99_ms": 50.0} for g in (1, 10, 2, 4, 8)]
    challenger = [
        {"goodput": 1.5 * b["goodput"], "ttft_p99_ms": 150.0, "tbt_p99_ms": t}
        for b, t in zip(baseline, (40.0, 60.0, 45.0, 55.0, 50.0), strict=True)
    ]
    found = ratios(challenger, baseline)
    assert found["goodput"].values == (1.5,) * 5
    assert found["goodput"].verdict == "better"
    assert found["ttft_p99_ms"].verdict == "worse"
    assert found["tbt_p99_ms"].verdict == "no difference shown"
    assert ratios(baseline, challenger)["ttft_p99_ms"].verdict == "better"


def test_a_ratio_over_zero_is_undefined_rather_than_left_out():
    found = ratios([{"goodput": 1.0}, {"goodput": 2.0}], [{"goodput": 1.0}, {"goodput": 0.0}])
    assert found["goodput"].interval is None
    assert found["goodput"].verdict == "undefined"


def test_two_rounds_are_judged_by_nobody():
    two = paired_ratios([{"goodput": 2.0}] * 2, [{"goodput": 1.0}] * 2)
    three = paired_ratios([{"goodput": 2.0}] * 3, [{"goodput": 1.0}] * 3)
    assert [two[0].verdict, three[0].verdict] == ["too few rounds", "better"]


def test_only_figures_that_every_round_has_are_compared():
    one = [{"goodput": 1.0, "capacity": 2.0}, {"goodput": 1.0}]
    assert set(ratios(one, one)) == {"goodput"}
    assert median_summary(one) == {"goodput": 1.0}


def summary(**changes):
    plain = {
        "goodput": 1.0,
        "attainment": 0.9,
        "ttft_p99_ms": 500.0,
        "tbt_p99_ms": 80.0,
        "output_tokens_per_s": 100.0,
        "stall_tbt_p99_ms": 80.0,
        "stall_ttft_p50_ms": 900.0,
    }
    return plain | changes


def test_goodput_decides_and_ties_fall_to_attainment_then_ttft():
    variants = {
        "a": summary(),
        "b": summary(attainment=0.95),
        "c": summary(attainment=0.95, ttft_p99_ms=400.0),
        "d": summary(goodput=0.9, ttft_p99_ms=1.0),
    }
    assert best(variants, "goodput", SLO) == "c"


def test_in_stalls_the_soonest_long_prompt_wins_among_those_within_the_target():
    variants = {
        "slow": summary(stall_ttft_p50_ms=5000.0),
        "soon": summary(stall_ttft_p50_ms=2000.0),
        "stalling": summary(stall_ttft_p50_ms=100.0, stall_tbt_p99_ms=900.0),
    }
    assert best(variants, "stall", SLO) == "soon"
    assert best(variants, "stall", Slo(1000, 10)) == "slow"


@pytest.mark.parametrize(
    ("criterion", "winner"),
    [("throughput", "fast"), ("tbt-p99", "smooth"), ("ttft-p99", "prompt"), ("attainment", "kept")],
)
def test_each_criterion_looks_at_its_own_figure(criterion, winner):
    variants = {
        "fast": summary(output_tokens_per_s=200.0),
        "smooth": summary(tbt_p99_ms=10.0),
        "prompt": summary(ttft_p99_ms=10.0),
        "kept": summary(attainment=1.0),
    }
    assert best(variants, criterion, SLO) == winner


def test_what_could_not_be_measured_never_wins():
    variants = {"broken": summary(ttft_p99_ms=math.nan), "works": summary(ttft_p99_ms=9e9)}
    assert best(variants, "ttft-p99", SLO) == "works"
