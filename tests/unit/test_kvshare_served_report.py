"""The benchmark of KVShare over HTTP: what it concludes, prints and writes."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_plugins.bench.errors import BenchError, ProcessFailedError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kvshare_served as bench  # noqa: E402
import kvshare_served_report as report  # noqa: E402
from kvshare_served_client import Outcome  # noqa: E402
from kvshare_served_requests import Asked, HangUp, Request, arrivals  # noqa: E402
from kvshare_served_trial import Trial, check_lengths, counted, plan, since  # noqa: E402


def request(*prompt, hang_up=None, **changes):
    return Request(0, Asked(list(prompt) or [1, 2]), 16, hang_up=hang_up, **changes)


def outcome(*chunks, sent=0.0, tokens=None, error=""):
    """What came back, with a token at each time of `chunks`."""
    return Outcome(sent, list(chunks), tokens or [1] * len(chunks), not error, error)


def test_figures_are_those_of_requests_that_were_answered_to_their_end():
    requests = [
        request(),
        request(novel=True),
        request(hang_up=HangUp(2, 9.0)),
        request(hang_up=HangUp(1, 9.0)),
        request(),
    ]
    outcomes = [
        outcome(1.0, 1.5, 2.0, sent=0.5),
        outcome(4.0, 4.25, sent=1.0, tokens=[1, 2, 3]),
        outcome(9.0, 20.0, sent=1.0),
        outcome(sent=1.0),
        outcome(30.0, error="HTTP 500"),
    ]
    found = report.summarise(requests, outcomes)
    assert {name: found[name] for name in report.COUNTS} == {
        "answered": 2,
        "aborted": 2,
        "aborted_before_first": 1,
        "errors": 1,
    }
    assert found["ttft_p50_ms"] == pytest.approx(1750)
    assert found["ttft_p99_ms"] == pytest.approx(500 + 0.99 * 2500)
    assert found["shared_ttft_p50_ms"] == pytest.approx(500)
    assert found["novel_ttft_p50_ms"] == pytest.approx(3000)
    assert report.waits(requests, outcomes, False) == [0.5]
    assert report.waits(requests, outcomes, True) == [3.0]
    assert found["tbt_p50_ms"] == pytest.approx(500)
    # From the first request sent, at 0, to the last answer, at 4.25.
    assert found["requests_per_s"] == pytest.approx(2 / 4.25)
    assert found["output_tokens_per_s"] == pytest.approx(6 / 4.25)


def test_there_are_no_figures_of_nothing():
    found = report.summarise([request(hang_up=HangUp(1, 1.0))], [outcome()])
    assert set(found) == set(report.COUNTS)


@pytest.mark.parametrize(("rounds", "spread"), [(3, "range"), (5, "95 % interval")])
def test_ratios_are_paired_by_round(rounds, spread):
    theirs = [{"ttft_p50_ms": 10.0 * (i + 1), "requests_per_s": 1.0} for i in range(rounds)]
    factors = [0.5, 0.4, 0.6, 0.45, 0.55][:rounds]
    ours = [
        {**t, "ttft_p50_ms": f * t["ttft_p50_ms"]} for f, t in zip(factors, theirs, strict=True)
    ]
    found = report.ratios(ours, theirs)
    assert set(found) == {"ttft_p50_ms", "requests_per_s"}
    ttft = found["ttft_p50_ms"]
    assert (ttft["median"], ttft["low"], ttft["high"]) == pytest.approx((0.5, 0.4, 0.6))
    assert ttft["all"] == pytest.approx(factors)
    assert ttft["spread"] == spread


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_answers_match_as_far_as_their_common_beginning(one, other):
    agreed = [n for n in range(min(len(one), len(other)) + 1) if one[:n] == other[:n]]
    assert report.matching(one, other) == max(agreed)


def test_only_answers_that_both_gave_are_compared():
    answers = [
        (request(), outcome(tokens=[1, 2, 3]), outcome(tokens=[1, 2, 3])),
        (request(), outcome(tokens=[1, 2, 3]), outcome(tokens=[1, 9, 3])),
        (request(novel=True), outcome(tokens=[4, 5]), outcome(tokens=[4, 5])),
        (request(hang_up=HangUp(1, 1.0)), outcome(tokens=[1]), outcome(tokens=[2])),
        (request(), outcome(tokens=[1]), outcome(tokens=[2], error="HTTP 500")),
        (request(), outcome(tokens=[1], error="HTTP 500"), outcome(tokens=[2])),
    ]
    assert report.agreement(answers) == {
        "compared": 3,
        "identical": pytest.approx(2 / 3),
        "identical_shared": 0.5,
        "identical_novel": 1.0,
        "matching_tokens": pytest.approx(2.0),
        "answer_tokens": pytest.approx(8 / 3),
    }
    nothing = report.agreement(answers[3:])
    assert nothing["compared"] == 0
    assert nothing["identical"] is None


def known(answer, hops, **changes):
    return Request(0, Asked([1], answer, hops), 16, **changes)


def test_right_answers_are_counted_by_the_documents_they_need():
    both = [
        (known(5, 1), outcome(tokens=[5, 2])),
        (known(5, 2), outcome(tokens=[6, 5])),
        (known(5, 2), outcome(tokens=[5])),
        (known(5, 2, hang_up=HangUp(1, 1.0)), outcome(tokens=[6])),
        (known(5, 1), outcome(error="HTTP 500")),
    ]
    found = report.right_answers(both)
    assert found == {
        "right": pytest.approx(2 / 3),
        "right_one_document": 1.0,
        "right_two_documents": 0.5,
    }
    assert report.right_answers([(request(), outcome(tokens=[5]))]) == {}


METRICS = """
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0"} 10
vllm:prompt_tokens_total{engine="1"} 5
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 7
# TYPE vllm_plugins:kvshare_reused_tokens_total counter
vllm_plugins:kvshare_reused_tokens_total{kind="exact"} 3
vllm_plugins:kvshare_reused_tokens_total{kind="approximate"} 4
vllm_plugins:kvshare_reused_tokens_created{kind="exact"} 1.7e9
# TYPE vllm_plugins:kvshare_stored_tokens gauge
vllm_plugins:kvshare_stored_tokens 100
# TYPE vllm_plugins:kvshare_relative_deviation histogram
vllm_plugins:kvshare_relative_deviation_bucket{le="1.0"} 8
vllm_plugins:kvshare_relative_deviation_bucket{le="+Inf"} 9
vllm_plugins:kvshare_relative_deviation_sum 1.5
vllm_plugins:kvshare_relative_deviation_count 9
"""


def test_counters_are_told_by_kind_and_since_the_start_of_what_is_measured():
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(METRICS)
    after = counted(sample for family in families for sample in family.samples)
    assert after == {
        "vllm:prompt_tokens_total": 15,
        "kvshare_reused_tokens_total{kind=exact}": 3,
        "kvshare_reused_tokens_total{kind=approximate}": 4,
        "kvshare_stored_tokens": 100,
        "kvshare_relative_deviation_sum": 1.5,
        "kvshare_relative_deviation_count": 9,
    }
    before = {
        "vllm:prompt_tokens_total": 6,
        "kvshare_reused_tokens_total{kind=approximate}": 1,
        "kvshare_stored_tokens": 40,
        "kvshare_relative_deviation_count": 2,
    }
    found = since(before, after)
    assert found["vllm:prompt_tokens_total"] == 9
    assert found["kvshare_reused_tokens_total{kind=exact}"] == 3
    assert found["kvshare_reused_tokens_total{kind=approximate}"] == 3
    assert found["kvshare_relative_deviation_count"] == 7
    assert found["kvshare_stored_tokens"] == 100


def trial(variant, number, answers, wait=1.0):
    outcomes = [outcome(wait, wait + 0.1, tokens=list(answer)) for answer in answers]
    return Trial(variant, number, 30.0, outcomes, {"kvshare_requests_total{kind=blend}": 2.0})


def test_a_round_is_compared_within_itself_and_stock_with_its_next_round():
    requests = [known(5, 1), known(6, 2)]
    trials = [
        trial("stock", 0, [(5, 2), (6, 2)], wait=2.0),
        trial("kvshare", 0, [(5, 2), (7, 2)], wait=1.0),
        trial("kvshare", 1, [(5, 3), (6, 2)], wait=1.0),
        trial("stock", 1, [(5, 3), (6, 2)], wait=4.0),
        trial("stock", 2, [(0, 0), (0, 0)], wait=100.0),
    ]
    found = report.conclude(requests, trials)
    assert found["ratios"]["kvshare / stock"]["ttft_p50_ms"]["all"] == pytest.approx([0.5, 0.25])
    assert found["agreement"]["kvshare / stock"]["identical"] == 0.75
    assert found["agreement"]["stock / itself, next round"]["identical"] == 0.5
    assert found["right"]["stock"]["right"] == 1.0
    assert found["right"]["kvshare"]["right_two_documents"] == 0.5
    assert found["medians"]["stock"]["ttft_p50_ms"] == pytest.approx(3000)
    assert found["counters_per_round"]["kvshare"] == {"kvshare_requests_total{kind=blend}": 2.0}


def test_without_a_whole_round_nothing_is_concluded():
    assert report.conclude([request()], [trial("stock", 0, [(1,)])])["ratios"] == {}
    assert report.conclude([request()], [trial("kvshare", 0, [(1,)])]) == {}


@contextmanager
def command_line(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["kvshare_served.py", *arguments])
        for name in bench.ENVIRONMENT:
            patch.setenv(name, "1")
        yield patch


def run_main(monkeypatch, tmp_path, *arguments, fails_at=99):
    turns = []

    def fake_trial(args, variant, turn, work, folder):
        if len(turns) == fails_at:
            raise ProcessFailedError("the server died", tmp_path / "no.log")
        turns.append((variant.name, turn))
        answers = [(r.asked.answer or 1, 2) for r in work[1]]
        return trial(variant.name, turn, answers, wait=1.0 if variant.name == "stock" else 0.5)

    out, plot = tmp_path / "deep" / "out.json", tmp_path / "plot.png"
    options = ("--rate", "5", "--rounds", "2", "--out", str(out), "--plot", str(plot))
    with command_line(monkeypatch, *options, *arguments) as patch:
        patch.setattr(bench, "run_trial", fake_trial)
        patch.setattr("tempfile.tempdir", str(tmp_path))
        code = bench.main()
    return code, turns, json.loads(out.read_text()) if out.exists() else None, plot


def test_servers_take_turns_and_the_report_has_all_parts(monkeypatch, tmp_path, capsys):
    code, turns, result, plot = run_main(
        monkeypatch, tmp_path, "--neutral", "--plugin-options", "min_run=16,recompute_max=0.3"
    )
    assert code == 0
    assert not list(tmp_path.glob("kvshare-served-*")), "logs of a good run are of no use"
    names = ["stock", "kvshare", "kvshare-neutral"]
    assert turns == [(name, 0) for name in names] + [(name, 1) for name in reversed(names)]
    assert result["outcome"] == "complete"
    assert result["variants"] == {
        "stock": [],
        "kvshare": ["--plugin", "kvshare:min_run=16,recompute_max=0.3"],
        "kvshare-neutral": ["--plugin", "kvshare:min_run=16,recompute_min=1,recompute_max=1"],
    }
    assert result["ratios"]["kvshare / stock"]["ttft_p50_ms"]["median"] == pytest.approx(0.5)
    assert "packages" in result["machine"]
    assert "git_commit" not in result["machine"]
    assert result["model"] == "reader"
    assert str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "command"})
    assert len(result["trials"]) == 6
    kinds = result["trials"][1]["ttft_s"]
    assert sum(map(len, kinds.values())) == result["trials"][1]["summary"]["answered"]
    assert {t for times in kinds.values() for t in times} == {0.5}
    assert plot.stat().st_size > 1000
    printed = capsys.readouterr().out
    for words in ("[6/6, 0 s left] stock, round 2: TTFT p50, ms 1000", "medians over rounds",
                  "kvshare / stock", "0.500 (0.500 to 0.500)", "stock / itself, next round",
                  "right_two_documents", "kvshare_requests_total{kind=blend}"):  # fmt: skip
        assert words in printed


def test_a_server_that_fails_late_leaves_what_was_measured(monkeypatch, tmp_path, capsys):
    code, turns, result, _ = run_main(monkeypatch, tmp_path, fails_at=3)
    assert code == 2
    assert len(turns) == 3
    assert result["outcome"] == "the server died"
    assert len(result["ratios"]["kvshare / stock"]["ttft_p50_ms"]["all"]) == 1
    [logs] = tmp_path.glob("kvshare-served-*")
    told = capsys.readouterr().err
    assert "error: the server died" in told
    assert f"logs are kept in {logs}" in told


def test_a_server_that_fails_at_once_leaves_nothing(monkeypatch, tmp_path, capsys):
    code, _, result, _ = run_main(monkeypatch, tmp_path, fails_at=0)
    assert (code, result) == (2, None)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--rate", "1", "--concurrency", "2"),
        ("--rate", "0"),
        ("--concurrency", "0"),
        ("--rate", "1", "--per-prompt", "9", "--documents", "8"),
        ("--rate", "1", "--rounds", "0"),
        ("--rate", "1", "--novel-share", "1.5"),
    ],
)
def test_a_command_line_without_sense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert "error" in capsys.readouterr().err


def test_requests_that_the_server_would_refuse_are_refused_before():
    check_lengths([request(1, 2, 3)], 19)
    with pytest.raises(BenchError, match="has 19 tokens and the server takes 18"):
        check_lengths([request(1, 2, 3)], 18)


def test_a_closed_loop_sends_at_once_and_an_open_one_at_the_rate():
    closed, _ = bench.parse(["--concurrency", "3"])
    assert plan(closed, 5, Random(0)) == ([0.0] * 5, 3)
    opened, _ = bench.parse(["--rate", "2"])
    assert plan(opened, 5, Random(0)) == (arrivals(5, 2.0, Random(0)), 5)
