"""Comparing policies in virtual time: the functions and the command."""

import json

import numpy as np
import pytest

from tests.engine.simulation import MACHINE
from vllm_plugins.bench.metrics import Slo
from vllm_plugins.bench.workloads import Request
from vllm_plugins.cli import main as cli
from vllm_plugins.simulator.config import write_model_config
from vllm_plugins.simulator.simulate import (
    Machine,
    Policy,
    capacity,
    figures,
    simulate,
    with_prompts,
)

COST = ",".join(f"{c:g}" for c in MACHINE.coefficients)
STOCK = Policy("stock", (), {"max_num_batched_tokens": 2048})
SARATHI = Policy("sarathi", ("sarathi:tbt_slo_ms=60",), {"max_num_batched_tokens": 2048})


@pytest.fixture
def machine(tmp_path):
    return Machine(write_model_config(tmp_path), MACHINE.seconds, arguments={"max_num_seqs": 32})


def workload(rate):
    return [Request(i / rate, (50, 1500)[i % 2], 20) for i in range(30)]


def test_trial_holds_every_token(machine):
    trial = simulate(machine, STOCK, with_prompts(workload(4.0)))
    assert not trial.failed.any()
    assert trial.output_tokens == 600
    assert trial.prompt_tokens == 15 * 1550
    assert np.bincount(trial.gap_owner).tolist() == [19] * 30
    assert (trial.ttft_s > 0).all()


def test_simulations_repeat_exactly(machine):
    first, second = (simulate(machine, SARATHI, with_prompts(workload(4.0))) for _ in range(2))
    np.testing.assert_array_equal(first.gap_s, second.gap_s)
    np.testing.assert_array_equal(first.ttft_s, second.ttft_s)


def test_plugin_has_more_capacity_where_stock_stalls(machine):
    slo = Slo(ttft_ms=1000, tbt_ms=60)
    found = [
        capacity(machine, policy, workload, slo, start=2.0, trials=4) for policy in (STOCK, SARATHI)
    ]
    assert found[1].rate > 1.5 * found[0].rate
    assert figures(machine, SARATHI, workload, found[1].rate, slo)["attainment"] >= 0.9


def test_command_writes_a_table_and_json(tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["simulate", "--plugin", "sarathi:tbt_slo_ms=100", "--plugin", "spf", "--cost", COST]
    sizes = ["--budgets", "512", "2048", "--requests", "20", "--rate", "3", "--out", str(out)]
    assert cli.main([*words, *sizes]) == 0
    rows = json.loads(out.read_text())
    names = ["stock 512", "stock 2048", "sarathi:tbt_slo_ms=100 + spf"]
    assert [row["policy"] for row in rows] == names
    assert rows[2]["tbt_p99_ms"] <= 100
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cost", "1,2"], "--cost 1,2: write 6 numbers, none negative"),
        (["--cost", COST, "--trace", "nowhere.csv"], "--trace nowhere.csv: no such file"),
    ],
)
def test_command_refuses(words, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["simulate", *words])
