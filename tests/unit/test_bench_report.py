import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vllm_plugins.bench import plot
from vllm_plugins.bench.capacity import Capacity
from vllm_plugins.bench.config import STALL, TRACE, BenchConfig, CapacitySearch, StallShape
from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.machine import describe_machine
from vllm_plugins.bench.metrics import Slo, read_trial, summarise, summarise_stall
from vllm_plugins.bench.report import (
    TrialProgress,
    notes,
    number,
    print_report,
    to_json,
    write_json,
)
from vllm_plugins.bench.results import PAIR, SWEEP, Point, Record, Results
from vllm_plugins.bench.runner import load_points, planned_trials
from vllm_plugins.bench.variants import Variant, static_variants

SLO = Slo(1000, 60)
POINT = Point("1 req/s", 1.0)


def config(**changes):
    plain = {
        "model": "models/m",
        "out": Path("out"),
        "workload": TRACE,
        "statics": tuple(static_variants([64])),
        "challengers": (Variant("plug"), Variant("ppas")),
        "slo": SLO,
        "criterion": "goodput",
        "repeats": 5,
    }
    return BenchConfig(**(plain | changes))


def trial(seed, scale, failed=0, requests=20):
    rng = np.random.default_rng(seed)
    return read_trial(
        {
            "ttfts": list(scale * rng.uniform(0.1, 1.2, requests)),
            "itls": [list(scale * rng.uniform(0.01, 0.08, 10)) for _ in range(requests)],
            "errors": ["boom"] * failed + [""] * (requests - failed),
            "start_times": list(np.arange(requests, dtype=float)),
            "input_lens": [10] * requests,
            "output_lens": [11] * requests,
            "duration": 20.0,
            "generated_texts": [str(i) for i in range(requests)],
        }
    )


def record(phase, number, variant, scale, point=POINT, **kinds):
    measured = trial(number, scale, **kinds)
    summary = summarise(measured, SLO)
    return Record(phase, number, variant, point, summary, measured, "logs/x", 9.0)


@pytest.fixture
def results():
    made = Results(config(), (POINT,))
    made.records += [record(SWEEP, 5, "stock", 1.5), record(SWEEP, 5, "stock-64", 1.0)]
    made.choose_best_static()
    for i in range(5):
        made.records += [
            record(PAIR, i, n, s) for n, s in (("stock-64", 1.0), ("plug", 0.5), ("ppas", 0.9))
        ]
    made.completions = {
        ("stock-64", 0): ("a", "b"),
        ("stock-64", 1): ("a", "b"),
        ("plug", 0): ("a", "b"),
        ("ppas", 0): ("a", "x"),
    }
    return made


def text_of(results):
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(results, console)
    return console.export_text()


def test_best_static_comes_from_the_sweep_alone(results):
    assert results.best_static.name == "stock-64"
    assert results.paired_names() == ["stock-64", "plug", "ppas"]
    alone = Results(config(statics=(Variant("stock-512"),)), (POINT,))
    assert alone.choose_best_static().name == "stock-512"


def test_every_challenger_meets_the_best_static_and_the_plugin_meets_the_others(results):
    pairs = [(c.challenger, c.baseline) for c in results.comparisons()]
    assert pairs == [("plug", "stock-64"), ("ppas", "stock-64"), ("plug", "ppas")]
    first = {r.figure: r for r in results.comparisons()[0].ratios}
    assert first["ttft_p50_ms"].values == pytest.approx((0.5,) * 5)
    assert first["ttft_p50_ms"].verdict == "better"


def test_a_round_with_one_side_missing_is_left_out_of_the_ratios(results):
    last = next(r for r in results.records if r.round == 4 and r.variant == "plug")
    results.records.remove(last)
    assert {len(r.values) for r in results.comparisons()[0].ratios} == {4}
    assert {len(r.values) for r in results.comparisons()[1].ratios} == {5}


def test_accuracy_is_beside_the_noise_of_the_engine(results):
    assert results.accuracy() == {
        "plug = stock-64": 1.0,
        "ppas = stock-64": 0.5,
        "stock-64 = itself": 1.0,
    }


def test_report_shows_sweep_medians_ratios_and_targets(results):
    text = text_of(results)
    assert "stock-64 (best)" in text
    assert "plug / stock-64 at 1 req/s" in text
    assert re.search(r"TTFT p50 +│ +lower │ +0.500 │ 0.500 to 0.500 │ better", text)
    assert "good request: TTFT <= 1000 ms and its TBT p99 <= 60 ms" in text
    assert "identical greedy completions, ppas = stock-64: 50%" in text
    assert "warning" not in text


def test_doubts_are_named(results):
    results.records.append(record(PAIR, 0, "late", 1.0, failed=3))
    results.records[-1].capacity = Capacity(0.0, 1.0, ((1.0, 0.2),))
    text = " ".join(notes(results))
    assert "3 requests failed" in text
    assert "1 capacity searches ended without a rate on both sides" in text


def test_few_rounds_are_said_to_prove_little(results):
    results.config = config(repeats=3)
    assert "3 rounds: an interval covers the true ratio at most 75%" in " ".join(notes(results))


def test_a_run_that_ended_in_the_sweep_reports_the_sweep_alone():
    made = Results(config(repeats=3), (POINT,))
    made.records.append(record(SWEEP, 3, "stock", 1.0))
    text = text_of(made)
    assert "Static settings" in text
    assert "Medians" not in text
    assert "warning" not in text


def test_decodes_that_did_not_cover_a_prefill_are_named():
    made = Results(config(workload=STALL, stall=StallShape(decodes=19)), (Point(STALL),))
    made.records.append(record(PAIR, 0, "stock", 1.0, point=Point(STALL)))
    made.records[0].summary["stall_decodes"] = 3.0
    assert "in 1 trials not every decode" in notes(made)[-1]


def test_result_file_is_strict_json_with_every_trial(results, tmp_path):
    results.records[0].summary["ttft_p50_ms"] = float("nan")
    context = {"machine": describe_machine(), "outcome": "complete"}
    write_json(tmp_path / "r.json", to_json(results, context))
    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert len(read["trials"]) == len(results.records)
    assert read["trials"][0]["summary"]["ttft_p50_ms"] is None
    assert read["best_static"] == "stock-64"
    assert read["config"]["statics"][1]["arguments"] == ["--max-num-batched-tokens", "64"]
    ratios = {ratio["figure"]: ratio for ratio in read["comparisons"][0]["ratios"]}
    assert ratios["ttft_p99_ms"]["interval"]["median"] == pytest.approx(0.5)
    assert ratios["goodput"]["interval"] is None, "no request of the slow side was good"
    assert read["machine"]["cpu"]
    assert read["machine"]["cpus"] >= 1


def test_secrets_in_the_environment_stay_out_of_the_result(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    settings = describe_machine()["settings"]
    assert settings["VLLM_API_KEY"] == "(hidden)"
    assert settings["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (float("nan"), "-"), (123.4, "123"), (0.01234, "0.0123")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_progress_counts_trials_and_leaves_a_line_for_each():
    console = Console(width=100, record=True, file=io.StringIO())
    with TrialProgress(console, 3) as progress:
        progress.start("one")
        progress.done(1, "one: fine")
        progress.done(2, "spared two")
    text = console.export_text()
    assert "[1/3" in text
    assert "[3/3] spared two" in text


def test_planned_trials_bound_what_a_run_takes():
    assert planned_trials(config()) == 2 + 3 * (5 + 2)
    only = (Variant("stock"),)
    assert planned_trials(config(statics=only, accuracy_prompts=0, challengers=only)) == 2 * 5
    search = CapacitySearch(enabled=True, trials=6)
    assert planned_trials(config(capacity=search)) == 2 + 3 * (5 * 7 + 2)
    assert planned_trials(config(capacity=search, criterion="capacity")) == 14 + 3 * (5 * 7 + 2)


def test_load_points_carry_rates_only_in_the_trace_workload():
    assert load_points(config()) == (Point("1 req/s", 1.0),)
    assert load_points(config(workload=STALL)) == (Point("stall"),)


@pytest.fixture
def pyplot():
    return pytest.importorskip("matplotlib.pyplot", reason="needs the extra 'tools'")


@pytest.mark.parametrize("with_capacity", [False, True])
def test_picture_has_distributions_ratios_and_capacities(results, tmp_path, pyplot, with_capacity):
    if with_capacity:
        for made in results.records:
            made.capacity = Capacity(2.0, 2.2, ((2.0, 1.0),))
            made.summary["capacity"] = 2.0
    plot.draw(results, tmp_path / "r.png")
    height, width, _ = pyplot.imread(tmp_path / "r.png").shape
    assert width > 3 * height
    assert not pyplot.get_fignums()


def test_picture_of_stalls_shows_long_prompts_and_stalled_decodes_alone(tmp_path, pyplot):
    shape = StallShape(decodes=18)
    made = Results(
        config(workload=STALL, stall=shape, statics=(Variant("stock"),), repeats=1), (Point(STALL),)
    )
    made.choose_best_static()
    long = np.arange(20) >= 18
    for name, scale in (("stock", 1.0), ("plug", 0.5), ("ppas", 0.7)):
        made.records.append(record(PAIR, 0, name, scale, point=Point(STALL)))
        made.records[-1].summary |= summarise_stall(made.records[-1].trial, long)
    plot.draw(made, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match=r"pip install 'vllm-plugins\[tools\]'"):
        plot.require_matplotlib()
