"""The script that measures the project's norms, on small samples."""

import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import check_norms  # noqa: E402

GOOD = '''"""A module."""


def double(value: int) -> int:
    """Return twice the value."""
    # Cheaper than a product here.
    return value + value
'''


def norms(source: str) -> list[str]:
    measured = check_norms.measure(source, "sample.py")
    return [f"{b.norm} {b.where}" for b in check_norms.breaches([measured])]


def long_function(lines: int) -> str:
    body = "".join(f"    a{i} = {i}\n" for i in range(lines - 2))
    return f'"""M."""\n\n\ndef f() -> None:\n    """F."""\n{body}'


def test_a_clean_module_breaks_nothing_and_is_counted():
    measured = check_norms.measure(GOOD, "good.py")
    assert check_norms.breaches([measured]) == []
    assert (measured.lines, measured.code_lines, measured.comments) == (7, 5, 1)
    assert measured.functions == (check_norms.Function("double", 4),)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (GOOD.removeprefix('"""A module."""'), "docstring sample.py:module"),
        (GOOD.replace('    """Return twice the value."""\n', ""), "docstring sample.py:double"),
        (GOOD + "\n\nclass _Hidden:\n    x = 1\n", "docstring sample.py:_Hidden"),
        (GOOD.replace("value: int", "value"), "annotation sample.py:double"),
        (GOOD.replace(" -> int", ""), "annotation sample.py:double"),
        (GOOD.replace("value: int", "*value"), "annotation sample.py:double"),
        (GOOD + "\n# more" * 400, "file-length sample.py"),
        (long_function(81), "function-length sample.py:f"),
        (long_function(36) + long_function(36).replace("def f", "def g"), "function-p90 package"),
        (long_function(11), "function-median package"),
    ],
)
def test_each_norm_is_found(source, expected):
    assert expected in norms(source)


def test_limits_themselves_are_allowed():
    short = "".join(f'\n\ndef s{i}() -> None:\n    """S."""\n' for i in range(30))
    assert norms(long_function(80) + short) == []


def test_private_and_local_functions_need_no_docstring_but_annotations():
    inner = "    def g(b):\n        return b\n\n    return g(a)\n"
    source = f'"""M."""\n\n\ndef _f(a: int) -> int:\n{inner}'
    assert norms(source) == ["annotation sample.py:_f.g"]


def test_methods_are_measured_without_self():
    method = "    def m(self, x: int) -> int:\n        return x\n"
    source = f'"""M."""\n\n\nclass C:\n    """C."""\n\n{method}'
    assert norms(source) == ["docstring sample.py:C.m"]


def exception(**changes):
    base = {"norm": "file-length", "where": "x.py", "date": date(2026, 1, 1), "reason": "a table"}
    return {**base, **changes}


BREACH = check_norms.Breach("file-length", "x.py", "has 500 lines, over 400")


def test_an_exception_covers_its_breach_alone():
    other = check_norms.Breach("file-length", "y.py", "has 401 lines, over 400")
    assert check_norms.judge([BREACH], [exception()]) == []
    assert check_norms.judge([BREACH, other], [exception()]) == [
        "file-length: y.py has 401 lines, over 400"
    ]


def test_the_list_may_only_shrink():
    (line,) = check_norms.judge([], [exception()])
    assert line == "exception for file-length of x.py: no longer needed, remove it"


@pytest.mark.parametrize("changes", [{"date": "soon"}, {"reason": " "}, {"date": None}])
def test_an_exception_without_date_or_reason_is_refused(changes):
    (line,) = check_norms.judge([BREACH], [exception(**changes)])
    assert line.endswith("needs a date and a reason")


def test_the_script_fails_on_a_breach(tmp_path, monkeypatch, capsys):
    (tmp_path / "vllm_plugins").mkdir()
    (tmp_path / "vllm_plugins" / "bad.py").write_text(long_function(81))
    listed = tmp_path / "exceptions.toml"
    listed.write_text("")
    monkeypatch.setattr(check_norms, "ROOT", tmp_path)
    monkeypatch.setattr(check_norms, "EXCEPTIONS", listed)
    assert check_norms.main([]) == 1
    assert "function-length: vllm_plugins/bad.py:f has 81 lines, over 80" in capsys.readouterr().err


def test_the_project_keeps_its_norms(capsys):
    assert check_norms.main(["--report"]) == 0, capsys.readouterr()
