"""The language of `--plugin`: every form, every refusal with its exact words, and quoting."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_plugins.errors import PluginError
from vllm_plugins.spec import FORM, PluginSpec, parse_specs


def options_of(text: str) -> dict:
    (spec,) = parse_specs([text])
    assert spec.name == "p"
    return spec.options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("p", {}),
        ("p:", {}),
        ("  p:a=1  ", {"a": "1"}),
        ("p:a=1,b=x", {"a": "1", "b": "x"}),
        ("p:a=1,", {"a": "1"}),
        ("p: a = 1 , b = x y ", {"a": "1", "b": "x y"}),
        ("p:a-b-c=1", {"a_b_c": "1"}),
        ("p:a=true,b=false", {"a": "true", "b": "false"}),
        ("p:a=null,b=1", {"a": None, "b": "1"}),
        ('p:a="null"', {"a": "null"}),
        ("p:a=", {"a": ""}),
        # Colons and equals signs belong to the value after the first of each.
        ("p:a=http://h:80/x?y=z", {"a": "http://h:80/x?y=z"}),
        ("p:a=c:d,b=e=f", {"a": "c:d", "b": "e=f"}),
        ('p:a="x,y=z",b=1', {"a": "x,y=z", "b": "1"}),
        (r'p:a="x\",y",b=1', {"a": 'x",y', "b": "1"}),
        ('p:a="[",b=1', {"a": "[", "b": "1"}),
        ("p:a=[1,2,3],b=1", {"a": [1, 2, 3], "b": "1"}),
        ('p:a={"x": [1, {"y": "]},"}]} , b=1', {"a": {"x": [1, {"y": "]},"}]}, "b": "1"}),
        # A quote or bracket inside a bare value is just a character of it.
        ("p:a=/m[1.json,b=2", {"a": "/m[1.json", "b": "2"}),
        ("p:a=b],c=2", {"a": "b]", "c": "2"}),
        ('p:a=b"c,d=2', {"a": 'b"c', "d": "2"}),
        ("p:a=it's,b=2", {"a": "it's", "b": "2"}),
        ("p:a=größe,b=日本", {"a": "größe", "b": "日本"}),
        ('{"name": "p"}', {}),
        ('{"name": "p", "a": 1, "b": [true, null]}', {"a": 1, "b": [True, None]}),
        ('{"p": {"a": 1.5}}', {"a": 1.5}),
        ('{"p": null}', {}),
        ('{"p": {}}', {}),
        ('["p"]', {}),
        ('["p:a=1,b=[2,3]"]', {"a": "1", "b": [2, 3]}),
        ('[{"name": "p", "a": 1}]', {"a": 1}),
        # As vLLM's YAML reader hands over a mapping inside a list.
        ("{'name': 'p', 'a': 1, 'b': True, 'c': None}", {"a": 1, "b": True, "c": None}),
        ("{'p': {'a': \"it's\"}}", {"a": "it's"}),
    ],
)
def test_one_plugin(text, options):
    assert options_of(text) == options


def test_several_plugins_keep_their_order():
    wanted = [PluginSpec("b", {"x": "1"}), PluginSpec("a", {}), PluginSpec("c", {"y": 2})]
    assert parse_specs(["b:x=1", "a", '{"name": "c", "y": 2}']) == wanted
    assert parse_specs(['["b:x=1", "a", {"name": "c", "y": 2}]']) == wanted
    assert parse_specs(['{"b": {"x": "1"}, "a": null, "c": {"y": 2}}']) == wanted
    assert parse_specs([]) == []


def no_name(text: str) -> str:
    return f"--plugin {text}: has no plug-in name; {FORM}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", no_name("")),
        (":a=1", no_name(":a=1")),
        ("a=1", no_name("a=1")),
        ("[]", no_name("[]")),
        ("{}", no_name("{}")),
        ("[[]]", no_name("[[]]")),
        ("[1]", no_name("[1]")),
        ('{"name": 1}', no_name('{"name": 1}')),
        ('{"a": 1, "b": 2}', no_name('{"a": 1, "b": 2}')),
        ("p:a", f"--plugin p:a: 'a' is not key=value; {FORM}"),
        ("p:a=1,b", f"--plugin p:a=1,b: 'b' is not key=value; {FORM}"),
        ("p:=1", f"--plugin p:=1: '=1' is not key=value; {FORM}"),
        ("p:a=1,,b=2", f"--plugin p:a=1,,b=2: '' is not key=value; {FORM}"),
        ("p:b,a=1", f"--plugin p:b,a=1: 'b' is not key=value; {FORM}"),
        ("p:a=1,a=2", "--plugin p:a=1,a=2: option 'a' is given twice; keep one"),
        ("p:a-b=1,a_b=2", "--plugin p:a-b=1,a_b=2: option 'a_b' is given twice; keep one"),
        (
            "p:a=[1,2",
            "--plugin p:a=[1,2: '[1,2' is not JSON "
            f"(Expecting ',' delimiter: line 1 column 5 (char 4)); {FORM}",
        ),
        (
            'p:a="b',
            "--plugin p:a=\"b: '\"b' is not JSON "
            f"(Unterminated string starting at: line 1 column 1 (char 0)); {FORM}",
        ),
        (
            "p:a=[1]2,b=3",
            "--plugin p:a=[1]2,b=3: '2,b=3' follows the value [1]; put a comma there",
        ),
        (
            '{"name": "p"',
            '--plugin {"name": "p": is not JSON '
            f"(Expecting ',' delimiter: line 1 column 13 (char 12)); {FORM}",
        ),
        ('{"name": "p", "a": 1, "a": 2}', '--plugin: "a": is given twice; keep one'),
        ('p:x={"a": 1, "a": 2}', '--plugin: "a": is given twice; keep one'),
    ],
)
def test_refusals_in_their_exact_words(text, message):
    with pytest.raises(PluginError) as refused:
        parse_specs([text])
    assert str(refused.value) == message


@pytest.mark.parametrize("texts", [["p", "p:a=1"], ['["p", "p"]'], ["p", '{"p": {"a": 1}}']])
def test_a_plugin_named_twice_is_refused(texts):
    with pytest.raises(PluginError) as refused:
        parse_specs(texts)
    message = "--plugin p: is named twice; put all its options into one --plugin"
    assert str(refused.value) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True).filter(lambda key: key != "name")
OPTIONS = st.dictionaries(KEYS, JSON, max_size=5)


@given(OPTIONS)
def test_any_options_survive_the_json_form(options):
    assert options_of(json.dumps({"name": "p", **options})) == options


@given(OPTIONS)
def test_any_options_survive_the_yaml_forms(options):
    assert options_of(json.dumps({"p": options})) == options
    finite = json.loads(json.dumps(options), parse_constant=lambda _: 0.0)
    assert options_of(str({"name": "p", **finite})) == finite


def bare(value: object) -> object:
    """What the short form makes of a value: numbers and booleans are left to the option's type."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


@given(OPTIONS)
def test_any_options_survive_the_short_form(options):
    text = ",".join(f"{key}={json.dumps(value)}" for key, value in options.items())
    assert options_of(f"p:{text}") == {key: bare(value) for key, value in options.items()}


@given(st.text())
def test_any_text_is_parsed_or_refused_in_one_error(text):
    try:
        specs = parse_specs([text])
    except PluginError as refused:
        assert str(refused).startswith("--plugin")
    else:
        assert specs
