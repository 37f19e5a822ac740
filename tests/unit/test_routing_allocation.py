"""The allocator against brute force, its choices, and the command's language."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from vllm_plugins.bench.capacity import Capacity
from vllm_plugins.cli.allocate import launch_lines, read_requests
from vllm_plugins.cli.main import main
from vllm_plugins.engine.cost_model import StepWork, chunk_work
from vllm_plugins.engine.cost_profile import CostProfile, ProfileKey
from vllm_plugins.errors import PluginError
from vllm_plugins.routing.allocation import (
    PRECISION,
    Candidate,
    Targets,
    allocate,
    at_rate,
    attainment,
    ranked,
    shapes,
)
from vllm_plugins.routing.stage_times import load_stage_times, times_of
from vllm_plugins.routing.virtual import Outcome, Request, Setup, Shape, simulate

TIMES = {
    "format": 1,
    "encode": {"base_ms": 5, "token_ms": 0.1},
    "prefill": {"base_ms": 10, "token_ms": 0.1},
    "decode": {"base_ms": 12, "request_ms": 0.1, "context_ms": 0.0005},
    "kv_blocks": 4000,
}


def stage_times(tmp_path, **changes):
    path = tmp_path / "times.json"
    path.write_text(json.dumps({**TIMES, **changes}))
    return load_stage_times(path)


def trace(images=(), prompt=400, output=40, count=150, seed=0):
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        now += rng.expovariate(2.0)
        requests.append(Request(now, prompt, output, tuple(images)))
    return requests


def test_every_split_is_a_candidate_once():
    text = [str(shape) for shape in shapes(3, with_images=False)]
    assert text == ["colocated", "1P 2D", "2P 1D"]
    images = [str(shape) for shape in shapes(3, with_images=True)]
    assert sorted(images) == sorted([*text, "1E 2PD", "2E 1PD", "1E 1P 1D"])
    for workers in range(1, 8):
        found = list(shapes(workers, with_images=True))
        brute = {
            Shape(e, p, d, c)
            for e in range(workers + 1)
            for p in range(workers + 1)
            for d in range(workers + 1)
            for c in range(workers + 1)
            if e + p + d + c == workers and (p > 0) == (d > 0) and (c > 0) != (p > 0)
        }
        assert len(found) == len(set(found)) and set(found) == brute


def test_attainment_is_joint_and_leaves_out_the_warm_up():
    def outcome(ttft, tpot):
        return Outcome(0.0, 11, ttft, ttft + 10 * tpot)

    outcomes = [outcome(9, 9)] + [outcome(0.1, 0.01)] * 3 + [outcome(0.1, 0.03)] * 3
    outcomes += [outcome(0.3, 0.01)] * 3
    assert attainment(outcomes, Targets(200, 20)) == pytest.approx(3 / 9)


def test_a_trace_keeps_its_proportions_at_another_rate():
    requests = [Request(t, 1, 1) for t in (2.0, 3.0, 6.0)]
    assert [one.arrival_s for one in at_rate(requests, 1.0)] == [0.0, 0.5, 2.0]
    with pytest.raises(PluginError, match="all arrive at once"):
        at_rate([Request(1.0, 1, 1)] * 2, 1.0)


@pytest.mark.parametrize("images", [(), (500, 500)])
def test_the_allocator_equals_brute_force_over_rates(tmp_path, images):
    times, targets = stage_times(tmp_path), Targets(400, 25)
    requests = trace(images, output=20, count=80)
    candidates = allocate(requests, times, 3, targets)
    for candidate in candidates:
        rate, best = 0.5, 0.0
        while rate < 80:
            share = attainment(
                simulate(at_rate(requests, rate), Setup(times, candidate.shape)), targets
            )
            best = rate if share >= targets.attainment else best
            rate *= 1.08
        # Attainment of a finite trace may pass the target twice within a few per cent.
        assert candidate.goodput == pytest.approx(best, rel=0.1), str(candidate.shape)
    most = max(one.goodput for one in candidates)
    assert candidates[0].goodput * PRECISION >= most


def test_negligible_encoding_gets_no_encode_worker(tmp_path):
    times = stage_times(tmp_path, encode={"base_ms": 0.01, "token_ms": 0.0001})
    best = allocate(trace((50,), count=80), times, 3, Targets(400, 25))[0]
    assert best.shape.encode == 0


def test_colocated_wins_where_the_hand_over_costs_more_than_it_saves(tmp_path):
    times = stage_times(tmp_path, transfer_ms_per_token=1.0)
    best = allocate(trace(), times, 3, Targets(400, 200))[0]
    assert str(best.shape) == "colocated"


def test_disaggregation_wins_where_prompts_stall_decodes(tmp_path):
    best = allocate(trace(prompt=2000, output=100), stage_times(tmp_path), 4, Targets(2000, 16))[0]
    assert best.shape.prefill > 0 and best.shape.decode > 0


def test_heavy_encoding_gets_encode_workers(tmp_path):
    # One after the other, the images of a request take 185 of the 230 ms.
    requests = trace((600, 600, 600), output=20)
    best = allocate(requests, stage_times(tmp_path), 4, Targets(230, 25))[0]
    assert best.shape.encode > 1


def test_targets_that_nobody_meets_give_a_goodput_of_zero(tmp_path):
    candidates = allocate(trace(), stage_times(tmp_path), 2, Targets(1, 1))
    assert [one.goodput for one in candidates] == [0.0, 0.0]


def test_the_simplest_of_equal_candidates_is_chosen():
    def candidate(shape, rate):
        return Candidate(shape, Capacity(rate, None, ()))

    split, wider = candidate(Shape(0, 1, 2), 10.0), candidate(Shape(1, 1, 1), 10.2)
    alone, poor = candidate(Shape(combined=3), 9.95), candidate(Shape(0, 2, 1), 2.0)
    assert ranked([poor, split, wider, alone]) == [alone, wider, split, poor]
    assert ranked([poor, split, wider])[0] is split
    assert ranked([poor, wider])[0] is wider


@pytest.mark.parametrize(
    ("shape", "lines"),
    [
        (Shape(combined=1), ["vllm serve m"]),
        (Shape(combined=3), ["vllm serve m --data-parallel-size 3"]),
        (
            Shape(prefill=1, decode=2),
            [
                "vllm serve m --plugin pd:role=prefill --port 8100",
                "vllm serve m --plugin pd:role=decode --port 8101",
                "vllm serve m --plugin pd:role=decode --port 8102",
                "vllm-plugins route --prefill http://127.0.0.1:8100 "
                "--decode http://127.0.0.1:8101 http://127.0.0.1:8102",
            ],
        ),
        (
            Shape(1, 1, 1),
            [
                "vllm serve m --plugin epd:role=encode --port 8100",
                "vllm serve m --plugin pd:role=prefill --plugin epd:role=prefill --port 8101",
                "vllm serve m --plugin pd:role=decode --plugin epd:role=prefill --port 8102",
                "vllm-plugins route --encode http://127.0.0.1:8100 --prefill http://127.0.0.1:8101 "
                "--decode http://127.0.0.1:8102",
            ],
        ),
    ],
)
def test_launch_lines(shape, lines):
    assert launch_lines(shape, "m") == lines


def command(tmp_path, *more):
    words = ["allocate", "--times", str(tmp_path / "times.json"), "--workers", "2"]
    return main([*words, *more])


def test_the_command_prints_the_choice_and_writes_it(tmp_path, capsys):
    stage_times(tmp_path)
    lines = [
        json.dumps({"arrival_s": i / 4, "prompt_tokens": 300, "output_tokens": 20})
        for i in range(60)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    out, picture = tmp_path / "result.json", tmp_path / "result.png"
    status = command(
        tmp_path, "--trace", str(tmp_path / "trace.jsonl"), "--slo-ttft-ms", "300",
        "--slo-tpot-ms", "30", "--out", str(out), "--plot", str(picture), "--model", "m",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert status == 0 and "vllm serve m" in shown and "colocated" in shown
    report = json.loads(out.read_text())
    assert report["simulated"] and len(report["candidates"]) == 2
    assert report["best"] == report["candidates"][0]["workers"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "goodput needs a target for TTFT and one for TPOT"),
        (["--slo-ttft-ms", "5"], "goodput needs a target for TTFT and one for TPOT"),
        (["--slo-ttft-ms", "0", "--slo-tpot-ms", "5"], "targets: must be over 0 ms"),
        (["--slo-ttft-ms", "nan", "--slo-tpot-ms", "5"], "targets: must be over 0 ms"),
        (
            ["--slo-ttft-ms", "9", "--slo-tpot-ms", "5", "--attainment", "1.5"],
            "--attainment: must be over 0 and at most 1",
        ),
        (
            ["--slo-ttft-ms", "9", "--slo-tpot-ms", "5", "--requests", "1"],
            "--requests: 1 requests have no rate",
        ),
        (["--slo-ttft-ms", "9", "--slo-tpot-ms", "5", "--workers", "0"], "--workers: 0 is too few"),
        (
            ["--slo-ttft-ms", "1", "--slo-tpot-ms", "1"],
            "allocate: no split meets the targets at any rate",
        ),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, words, message):
    stage_times(tmp_path)
    assert command(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is malformed (file: Invalid JSON"),
        ("{}", "is malformed (prefill: Field required"),
        (json.dumps({**TIMES, "kv_blocks": 0}), "kv_blocks: Input should be greater"),
        (json.dumps({**TIMES, "speed": 3}), "speed: Extra inputs are not permitted"),
        (json.dumps({**TIMES, "prefill": {"base_ms": -1, "token_ms": 1}}), "prefill.base_ms"),
        (json.dumps({**TIMES, "prefill": {"base_ms": 1, "token_ms": float("nan")}}), "finite"),
        (" " * 70_000, "is larger than 65536 bytes"),
    ],
)
def test_malformed_times_are_refused(tmp_path, text, message):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(PluginError) as refused:
        load_stage_times(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def profiled(tmp_path, knee=None):
    """Write a cost profile; return its file and its model."""
    key = dict.fromkeys(("model", "dtype", "device", "vllm"), "x")
    profile = CostProfile(
        key=ProfileKey(**key, tensor_parallel=1, pipeline_parallel=1),
        coefficients=(8e-3, 2e-4, 1e-4 if knee else 0.0, 1e-4, 8e-7, 1.5e-7),
        knee=knee,
        tile=1,
    )
    path = tmp_path / "profile.json"
    path.write_text(profile.model_dump_json())
    return path, profile


@pytest.mark.parametrize("knee", [None, 64])
def test_stage_times_of_a_profile_are_what_it_predicts(tmp_path, knee):
    _, profile = profiled(tmp_path, knee)
    times, model = times_of(profile, 100, 32), profile.cost_model()
    for tokens in (64, 300, 2000):
        work = StepWork(tokens, 1, 0.0, chunk_work(tokens, 0))
        assert times.prefill.ms(tokens) == pytest.approx(1e3 * model.seconds(work))
    for batch, context in ((1, 50), (40, 9000)):
        work = StepWork(batch, batch, context, 0.0)
        assert times.decode.ms(batch, context) == pytest.approx(1e3 * model.seconds(work))
    assert (times.kv_blocks, times.block_size) == (100, 32)


def test_the_command_takes_a_profile(tmp_path, capsys):
    path, _ = profiled(tmp_path)
    words = ["allocate", "--profile", str(path), "--workers", "2", "--requests", "60",
             "--slo-ttft-ms", "5000", "--slo-tpot-ms", "50"]  # fmt: skip
    assert main(words) == 2
    assert "does not say how many KV blocks" in capsys.readouterr().err
    assert main([*words, "--kv-blocks", "4000"]) == 0
    assert "vllm serve MODEL" in capsys.readouterr().out
    trace = tmp_path / "trace.jsonl"
    line = {"arrival_s": 1, "prompt_tokens": 900, "output_tokens": 2, "images": [576]}
    trace.write_text("\n".join([json.dumps(line)] * 2))
    assert main([*words, "--kv-blocks", "4000", "--trace", str(trace)]) == 2
    assert "does not say how long images take" in capsys.readouterr().err


def test_the_documentation_has_a_file_of_stage_times_that_is_read(tmp_path):
    text = (Path(__file__).resolve().parents[2] / "docs/disaggregation.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "times.json"
    path.write_text(example)
    times = load_stage_times(path)
    # With every name that there is.
    assert json.loads(example).keys() == times.model_dump().keys()
    for stage in ("encode", "prefill", "decode"):
        assert json.loads(example)[stage].keys() == times.model_dump()[stage].keys()


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(PluginError, match="cannot be read"):
        load_stage_times(tmp_path / "none.json")
    with pytest.raises(PluginError, match="cannot be read"):
        read_requests(str(tmp_path / "none.jsonl"), 10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{}", "line 1 is malformed (arrival_s: Field required)"),
        ("a.jsonl", "oops", "line 1 is malformed (line: Invalid JSON"),
        (
            "a.jsonl",
            '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n'
            '{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}',
            "line 2 is malformed (line: Value error, a request cannot arrive at nan s)",
        ),
        (
            "a.jsonl",
            '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "images": [0]}',
            "have at least one token",
        ),
        ("a.csv", "x,y\n1,2", "column 'TIMESTAMP' is missing"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2", "is malformed"),
    ],
)
def test_malformed_traces_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PluginError) as refused:
        read_requests(str(tmp_path / name), 10)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_shipped_trace_is_read_in_order():
    requests = read_requests("azure", 50)
    assert len(requests) == 50 and requests[0].arrival_s == 0.0
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(requests))
