"""The metrics writer: what it writes is what a scrape shows, in every kind and across processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import vllm_plugins.metrics as m
from vllm_plugins.metrics import ACTIVE, Metrics, MetricSpec

SPECS = (
    ACTIVE,
    MetricSpec("a_total", "counter", "A counter."),
    MetricSpec("b", "gauge", "A gauge."),
    MetricSpec("c_seconds", "histogram", "A histogram.", (0.5, 1.0, 2.5)),
)
LABELS = {"engine": "0", "model_name": 'a "quoted", model'}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.delenv(m.VLLM_DIRECTORY, raising=False)
    monkeypatch.setenv(m.OWN_DIRECTORY, str(tmp_path))
    return tmp_path


def scrape(folder) -> tuple[dict, dict]:
    """Return the samples by name and labels, and the type and help of each family."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    samples = {
        (s.name.removeprefix(m.PREFIX), *sorted(set(s.labels.items()) - LABELS.items())): s.value
        for family in families
        for s in family.samples
        if LABELS.items() <= s.labels.items()
    }
    described = {f.name.removeprefix(m.PREFIX): (f.type, f.documentation) for f in families}
    return samples, described


def histogram(samples) -> list[float]:
    bounds = ("0.5", "1.0", "2.5", "+Inf")
    return [samples["c_seconds_bucket", ("le", bound)] for bound in bounds]


def test_counters_and_histograms_exist_from_the_start(folder):
    Metrics(SPECS, LABELS)
    samples, described = scrape(folder)
    assert samples["a_total",] == samples["c_seconds_count",] == 0
    assert histogram(samples) == [0, 0, 0, 0]
    # A gauge has no value until it is set.
    assert not [key for key in samples if key[0] in ("active", "b")]
    assert described == {
        "a": ("counter", "A counter."),
        "b": ("gauge", "A gauge."),
        "c_seconds": ("histogram", "A histogram."),
    }


def test_values_of_every_kind(folder):
    metrics = Metrics(SPECS, LABELS)
    metrics.inc("a_total")
    metrics.inc("a_total", 2.5)
    metrics.set("b", 7)
    metrics.set("b", -3)
    metrics.set("active", 1, "sarathi")
    metrics.set("active", 1, "spf")
    for value in (0.1, 0.5, 0.500001, 2.5, 3, 1e9):
        metrics.observe("c_seconds", value)
    samples, _ = scrape(folder)
    assert samples["a_total",] == 3.5
    assert samples["b",] == -3
    assert samples["active", ("plugin", "sarathi")] == samples["active", ("plugin", "spf")] == 1
    # A bound belongs to its own bucket, and buckets are cumulative.
    assert histogram(samples) == [2, 3, 4, 6]
    assert samples["c_seconds_count",] == 6
    assert samples["c_seconds_sum",] == pytest.approx(0.1 + 0.5 + 0.500001 + 2.5 + 3 + 1e9)


def test_observations_that_were_counted_elsewhere_add_up_with_single_ones(folder):
    metrics = Metrics(SPECS, LABELS)
    metrics.observe("c_seconds", 0.1)
    metrics.observe_counts("c_seconds", [1, 0, 2, 3], 50.0)
    samples, _ = scrape(folder)
    assert histogram(samples) == [2, 2, 4, 7]
    assert samples["c_seconds_sum",] == pytest.approx(50.1)
    with pytest.raises(ValueError, match="shorter"):
        metrics.observe_counts("c_seconds", [1, 0], 1.0)


@pytest.mark.parametrize("call", ["inc", "set", "observe"])
def test_a_name_that_was_not_declared_is_an_error(folder, call):
    metrics = Metrics(SPECS, LABELS)
    with pytest.raises(KeyError, match="zzz"):
        getattr(metrics, call)("zzz", 1)


def test_a_writer_in_the_same_process_goes_on_where_the_last_one_stopped(folder):
    Metrics(SPECS, LABELS).inc("a_total", 2)
    Metrics(SPECS, LABELS).inc("a_total", 3)
    assert scrape(folder)[0]["a_total",] == 5


WRITER = """
from tests.unit.test_metrics import SPECS, LABELS
from vllm_plugins.metrics import Metrics
metrics = Metrics(SPECS, LABELS)
metrics.inc("a_total", 4)
metrics.set("b", 9)
metrics.observe("c_seconds", 0.7)
"""


def test_another_process_finds_the_servers_folder(folder):
    Metrics(SPECS, LABELS).inc("a_total", 1)
    subprocess.run([sys.executable, "-c", WRITER], check=True)
    samples, _ = scrape(folder)
    assert samples["a_total",] == 5
    assert samples["b",] == 9
    assert samples["c_seconds_count",] == 1


def test_vllms_own_multiprocess_folder_comes_first(folder, monkeypatch, tmp_path_factory):
    own = tmp_path_factory.mktemp("vllm")
    monkeypatch.setenv(m.VLLM_DIRECTORY, str(own))
    Metrics(SPECS, LABELS).inc("a_total", 2)
    assert scrape(own)[0]["a_total",] == 2
    assert not list(folder.iterdir())


PUBLISH = """
import os, pathlib
import vllm_plugins.metrics as m
from prometheus_client import REGISTRY, generate_latest
gauge = m.MetricSpec("b", "gauge", "A gauge.")
if ENGINE_FIRST:
    del os.environ[m.OWN_DIRECTORY]
    m.Metrics([gauge], {})
m.publish_in_this_process()
m.publish_in_this_process()
m.Metrics([gauge], {}).set("b", 9)
shown = [line for line in generate_latest(REGISTRY).decode().splitlines() if "vllm_plugins" in line]
assert shown[-1] == "vllm_plugins:b 9.0" and len(shown) == 3, shown
print(os.environ[m.OWN_DIRECTORY])
"""


@pytest.mark.parametrize("engine_first", [False, True])
def test_a_server_publishes_once_and_cleans_up(folder, engine_first):
    """The default registry shows the values once, and the folder goes with the process.

    The server's parent has plug-ins too, and values of the same names.
    """
    Metrics(SPECS, {}).set("b", 5)
    env = dict(os.environ)
    script = f"ENGINE_FIRST = {engine_first}\n{PUBLISH}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    own = Path(done.stdout.strip())
    assert own != folder
    assert not own.exists()


def test_two_writers_of_one_process_share_its_files(folder):
    """As the scheduler host and a KV connector do; neither overwrites what the other wrote."""
    other = MetricSpec("d_total", "counter", "Another writer's counter.")
    first, second = Metrics(SPECS, LABELS), Metrics([ACTIVE, other], LABELS)
    first.inc("a_total", 2)
    second.inc("d_total", 3)
    first.set("active", 1, "one")
    second.set("active", 1, "two")
    first.observe("c_seconds", 0.7)
    second.inc("d_total", 3)
    first.inc("a_total", 5)
    samples, _ = scrape(folder)
    assert samples["a_total",] == 7
    assert samples["d_total",] == 6
    assert samples["active", ("plugin", "one")] == samples["active", ("plugin", "two")] == 1
    assert samples["c_seconds_count",] == 1
    names = [path.name for path in folder.iterdir()]
    assert len(names) == len(set(names)) == 3
