import json

import numpy as np
import pytest

from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.workloads import (
    DECODE,
    LONG,
    Lengths,
    Request,
    TraceRow,
    check_fits,
    from_trace,
    load_trace,
    offline,
    sample_for_accuracy,
    stall,
    trace_lines,
)


@pytest.fixture(scope="module")
def sample():
    return load_trace()


def test_shipped_sample_is_a_stretch_of_the_azure_chat_trace(sample):
    assert len(sample) == 512
    assert sample[0] == TraceRow(0.0, 1992, 76)
    arrivals = np.array([row.arrival_s for row in sample])
    assert (np.diff(arrivals) >= 0).all()
    assert 4 < 512 / arrivals[-1] < 6, "requests per second of the service"


def test_arrivals_keep_microseconds(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.9999990,10,2\n"
        "2023-11-17 00:00:00.0000110,20,3\n"
    )
    first, second = load_trace(path)
    assert (first.arrival_s, second.prompt_tokens, second.output_tokens) == (0.0, 20, 3)
    assert second.arrival_s == pytest.approx(12e-6, abs=1e-6)


def test_rows_are_put_in_order_of_arrival(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 10:00:05.0000000,2,2\n2023-11-16 10:00:00.0000000,1,1\n"
    )
    assert [row.prompt_tokens for row in load_trace(path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,ContextTokens,GeneratedTokens\n1,2,3\n", "column 'TIMESTAMP' is missing"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no rows"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        load_trace(path)


@pytest.mark.parametrize("rate", [0.1, 1.0, 7.5])
@pytest.mark.parametrize("window", [0, 3])
def test_scaling_keeps_count_order_and_proportions_and_sets_the_rate(sample, rate, window):
    requests = from_trace(sample, 50, rate, Lengths(), window)
    arrivals = np.array([r.arrival_s for r in requests])
    assert len(requests) == 50
    assert arrivals[0] == 0
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals[-1] == pytest.approx(49 / rate)
    rows = sample[window * 50 : window * 50 + 50]
    real = np.diff([row.arrival_s for row in rows])
    assert np.diff(arrivals) == pytest.approx(real / real.mean() / rate)
    assert [r.prompt_tokens for r in requests] == [min(4096, row.prompt_tokens) for row in rows]


def test_windows_are_disjoint_until_the_trace_ends_and_then_repeat(sample):
    first, second = (from_trace(sample, 256, 1, Lengths(), w) for w in (0, 1))
    assert [r.prompt_tokens for r in first] != [r.prompt_tokens for r in second]
    assert from_trace(sample, 256, 1, Lengths(), 2) == first


def test_a_trace_longer_than_its_file_repeats_and_stays_in_order(sample):
    requests = from_trace(sample, 1100, 2, Lengths())
    arrivals = np.array([r.arrival_s for r in requests])
    assert (np.diff(arrivals) >= 0).all()
    assert requests[0].prompt_tokens == requests[512].prompt_tokens == requests[1024].prompt_tokens


def test_one_request_and_simultaneous_rows_have_arrivals():
    rows = [TraceRow(0, 5, 5), TraceRow(0, 6, 6)]
    assert [r.arrival_s for r in from_trace(rows, 1, 4, Lengths())] == [0.0]
    assert [r.arrival_s for r in from_trace(rows, 2, 4, Lengths())] == [0.0, 0.25]


@pytest.mark.parametrize(("count", "rate"), [(0, 1.0), (5, 0.0), (5, -1.0)])
def test_impossible_traces_are_refused(sample, count, rate):
    with pytest.raises(BenchError, match="positive rate"):
        from_trace(sample, count, rate, Lengths())


def test_lengths_are_scaled_then_capped_and_never_empty():
    lengths = Lengths(scale=0.1, max_input=100, max_output=20)
    assert lengths.fit(TraceRow(0, 500, 100)) == (50, 10)
    assert lengths.fit(TraceRow(0, 5000, 1000)) == (100, 20)
    assert lengths.fit(TraceRow(0, 1, 1)) == (1, 1)


def test_stall_has_its_decodes_first_and_long_prompts_at_even_times():
    requests = stall(3, 1000, 64, stalls=2, start_s=1.5, every_s=4)
    assert [r.role for r in requests] == [DECODE] * 3 + [LONG] * 2
    assert [r.arrival_s for r in requests] == [0, 0, 0, 1.5, 5.5]
    assert {r.prompt_tokens for r in requests if r.role == LONG} == {1000}
    assert {r.output_tokens for r in requests if r.role == DECODE} == {64}


def test_offline_and_accuracy_requests_wait_from_the_start(sample):
    assert offline(2, 32, 8) == [Request(0.0, 32, 8)] * 2
    picked = sample_for_accuracy(from_trace(sample, 20, 1, Lengths()), 4, 32)
    assert len(picked) == 4
    assert all(r.arrival_s == 0 and r.output_tokens <= 32 for r in picked)


def test_contents_are_the_same_per_trial_and_never_shared_between_requests_or_trials():
    requests = offline(100, 32, 8)

    def contents(seed, trial):
        return [json.loads(line)["hash_ids"][0] for line in trace_lines(requests, seed, trial)]

    assert contents(0, 1) == contents(0, 1)
    everything = [c for seed in (0, 1) for trial in (0, 1, 999) for c in contents(seed, trial)]
    assert len(set(everything)) == len(everything)


def test_trace_lines_hold_what_the_load_generator_reads():
    (line,) = trace_lines([Request(1.25, 7, 3)], seed=0, trial=2)
    assert json.loads(line) == {
        "timestamp": 1.25,
        "input_length": 7,
        "output_length": 3,
        "hash_ids": [200_000],
    }


def test_requests_that_the_server_would_reject_are_refused_with_the_options_to_change():
    check_fits([Request(0, 90, 10)], 100)
    with pytest.raises(BenchError, match=r"has 101 tokens.* takes 100.*--length-scale"):
        check_fits([Request(0, 10, 10), Request(1, 91, 10)], 100)
    with pytest.raises(BenchError, match="in order of arrival"):
        check_fits([Request(1, 1, 1), Request(0, 1, 1)], 100)
