"""What a deployment is told, what it refuses, and what it tells Ray Serve and its servers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vllm_plugins.activation import _add_flag
from vllm_plugins.cli import main
from vllm_plugins.cli.deploy import read_file, values_of
from vllm_plugins.cli.route import read_settings as read_router_settings
from vllm_plugins.deploy import application, launch
from vllm_plugins.deploy.arguments import world_size
from vllm_plugins.deploy.autoscaling import by_load
from vllm_plugins.deploy.settings import DeploySettings, read_settings
from vllm_plugins.errors import PluginError
from vllm_plugins.registry import load, validate_options
from vllm_plugins.routing import Role
from vllm_plugins.spec import parse_specs

ROOT = Path(__file__).resolve().parents[2]
LOCAL = "127.0.0.1"


def settings(**values: Any) -> DeploySettings:
    return read_settings({"model": "m"} | values)


def from_words(*words: str) -> DeploySettings:
    args = main.build_parser("deploy").parse_args(["deploy", "--ray", *words])
    return read_settings(values_of(args))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model: string should have at least 1 character"),
    ({"models": 1}, "models: extra inputs are not permitted"),
    ({"name": "Bad_Name"}, "name: string should match pattern"),
    ({"prefill": {"replicas": 0}}, "prefill needs one instance at least"),
    ({"decode": {"replicas": 0}}, "there is nothing to disaggregate"),
    ({"decode": {"replicas": "4:2"}}, "decode.replicas: at most 2 is below at least 4"),
    ({"decode": {"replicas": "0:2"}}, "a role without an instance cannot serve"),
    ({"decode": {"replicas": "many"}}, "decode.replicas: input should be a valid dictionary"),
    ({"decode": {"replicas": True}}, "decode.replicas: input should be a valid dictionary"),
    ({"decode": {"replicas": 5000}}, "input should be less than or equal to 1000"),
    ({"drain_s": float("inf")}, "drain_s: input should be"),
    ({"pd": {"lease_s": -1}}, "--plugin pd: lease_s=-1: input should be greater than 0"),
    ({"pd": {"leases": 1}}, "--plugin pd: leases: unknown option"),
    ({"encode": {"replicas": 1}, "epd": {"arena_bytes": 0}}, "--plugin epd: arena_bytes=0"),
    ({"serve_args": ["--port", "1"]}, "--port: is not an instance's own choice"),
    ({"serve_args": ["--api_key=x"]}, "--api-key: is not an instance's own choice; it would"),
    ({"decode": {"replicas": 1, "serve_args": ["--host=x"]}}, "--host: is not an instance's own"),
    ({"serve_args": ["--plugin", "pd:role=both"]}, "--plugin pd: the deployment sets it"),
    ({"serve_args": ['--plugin={"name": "epd"}']}, "--plugin epd: the deployment sets it"),
    ({"serve_args": ["-tp", "two"]}, "-tp two: is no size"),
    ({"router_args": ["--retry", "1"]}, "router_args: unrecognized arguments: --retry 1"),
    ({"router_args": ["--retries", "99"]}, "router_args: argument --retries: 99 is above 16"),
    ({"router_args": ["--port", "9"]}, "router_args --port: the deployment sets it"),
    ({"router_args": ["--prefill", "http://h:1"]}, "router_args --prefill: the deployment"),
    ({"secret_file": "s"}, "s: is no absolute path"),
    ({"network": "cluster"}, "secret_file: instances on several hosts need a secret"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PluginError) as refused:
        settings(**values)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_numbers_of_instances() -> None:
    chosen = settings(decode={"replicas": "2:4"}, encode={"replicas": 1})
    assert (chosen.prefill.replicas.least, chosen.prefill.replicas.most) == (1, 1)
    assert (chosen.decode.replicas.least, chosen.decode.replicas.most) == (2, 4)
    assert chosen.roles() == [Role.ENCODE, Role.PREFILL, Role.DECODE]
    assert settings(encode={"replicas": 1}, decode={"replicas": 0}).roles() == [
        Role.ENCODE,
        Role.PREFILL,
    ]


def test_settings_survive_the_way_to_a_replica() -> None:
    chosen = settings(decode={"replicas": "2:4"}, secret_file="/s", serve_args=["-tp", "2"])
    assert read_settings(json.loads(json.dumps(chosen.model_dump(mode="json")))) == chosen


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ([], 1),
        (["--tensor-parallel-size", "4"], 4),
        (["--tensor-parallel-size=4", "-pp", "2"], 8),
        (["-tp", "2", "--tensor-parallel-size=4"], 4),
        (["-tp=2", "-dp", "3", "--max-model-len", "8"], 6),
    ],
)
def test_an_instance_gets_a_gpu_for_each_worker(arguments: list[str], size: int) -> None:
    assert world_size(arguments) == size
    assert settings(serve_args=arguments).gpus(Role.DECODE) == size
    assert settings(serve_args=arguments, device="cpu").gpus(Role.DECODE) == 0


def test_a_role_wins_over_all_roles() -> None:
    chosen = settings(
        num_cpus=2,
        serve_args=["-tp", "2"],
        decode={"replicas": 1, "num_cpus": 8, "num_gpus": 0.5},
        prefill={"replicas": 1, "serve_args": ["-tp", "4"]},
    )
    assert (chosen.cpus(Role.PREFILL), chosen.gpus(Role.PREFILL)) == (2, 4)
    assert (chosen.cpus(Role.DECODE), chosen.gpus(Role.DECODE)) == (8, 0.5)


def plugins_of(command: list[str]) -> dict[str, dict[str, Any]]:
    """Return the plug-ins of a command line as `vllm serve` reads them, validated."""
    flag = _add_flag(argparse.ArgumentParser(allow_abbrev=False))
    texts = flag.parse_known_args(command)[0].plugin
    specs = {spec.name: spec.options for spec in parse_specs([str(text) for text in texts])}
    for name, options in specs.items():
        validate_options(load(name), options)
    return specs


def test_launch_line_of_an_instance_on_one_host() -> None:
    chosen = settings(serve_args=["--max-model-len", "99"], pd={"lease_s": 7})
    command = launch.engine_command(chosen, Role.PREFILL, LOCAL, 81)
    start = command.index("serve")
    assert command[start + 1 : start + 6] == ["m", "--host", LOCAL, "--port", "81"]
    assert command[-2:] == ["--max-model-len", "99"]
    assert plugins_of(command) == {"pd": {"lease_s": 7, "role": "prefill"}}


@pytest.mark.parametrize("role", Role)
def test_instances_on_several_hosts_listen_on_their_nodes_address(role: Role) -> None:
    chosen = settings(encode={"replicas": 1}, network="cluster", secret_file="/a, b/s")
    specs = plugins_of(launch.engine_command(chosen, role, "10.1.2.3", 81))
    shared = {"allow_remote": True, "secret_file": "/a, b/s"}
    here = {"bind_host": "10.1.2.3"}
    assert (
        specs
        == {
            Role.ENCODE: {"epd": {"role": "encode", **shared, **here}},
            Role.PREFILL: {
                "pd": {"role": "prefill", **shared, **here},
                "epd": {"role": "prefill", **shared},
            },
            Role.DECODE: {"pd": {"role": "decode", **shared}, "epd": {"role": "prefill", **shared}},
        }[role]
    )


def test_what_becomes_of_a_missing_image_is_for_those_that_want_it() -> None:
    chosen = settings(encode={"replicas": 1}, epd={"on_missing": "encode_local", "lease_s": 40})
    found = {role: {s["name"]: s for s in chosen.plugins(role)}["epd"] for role in Role}
    assert found[Role.ENCODE] == {"name": "epd", "role": "encode", "lease_s": 40}
    for role in (Role.PREFILL, Role.DECODE):
        assert (found[role]["role"], found[role]["on_missing"]) == ("prefill", "encode_local")


def test_without_decode_instances_nothing_is_handed_over() -> None:
    chosen = settings(encode={"replicas": 1}, decode={"replicas": 0})
    assert set(plugins_of(launch.engine_command(chosen, Role.PREFILL, LOCAL, 81))) == {"epd"}


def test_launch_line_of_the_router() -> None:
    chosen = settings(
        pd={"lease_s": 7}, drain_s=4, port=99, router_args=["--retries", "3"], secret_file="/s"
    )
    instances = {Role.PREFILL: ["http://a:1"], Role.DECODE: ["http://b:1", "http://[::1]:2"]}
    command = launch.router_command(chosen, instances, Path("/k"))
    words = command[command.index("route") :]
    router = read_router_settings(main.build_parser("route").parse_args(words))
    router.check()
    assert router.prefill == ("http://a:1",)
    assert router.decode == ("http://b:1", "http://[::1]:2")
    assert (router.port, router.lease_s, router.drain_s, router.retries) == (99, 7, 4, 3)
    assert (router.secret_file, router.admin_key_file) == (Path("/s"), Path("/k"))
    assert router.start_timeout_s == launch.ROUTER_START_S


def test_keys_stand_in_the_environment_and_nowhere_else(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-secret\n")
    chosen = settings(api_key_file=str(key))
    assert launch.environment(chosen) == {"VLLM_API_KEY": "sk-secret"}
    assert launch.environment(settings()) == {}
    shown = json.dumps(
        [
            launch.engine_command(chosen, Role.DECODE, LOCAL, 1),
            launch.router_command(chosen, {}, Path("/k")),
            chosen.model_dump(mode="json"),
            application.serve_config(chosen),
        ]
    )
    assert "sk-secret" not in shown


@pytest.mark.parametrize("text", ["", "two words", "ключ", "x" * 5000])
def test_a_bad_key_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(PluginError, match="is no key"):
        launch.read_key(path)
    with pytest.raises(PluginError, match="cannot be read"):
        launch.read_key(tmp_path / "none")


def test_what_ray_serve_is_told() -> None:
    chosen = settings(
        decode={"replicas": {"least": 1, "most": 3, "target_requests": 5}},
        prefill={"replicas": 2, "resources": {"fast": 1}},
        drain_s=7,
    )
    prefill = application.engine_options(chosen, Role.PREFILL)
    assert prefill["num_replicas"] == 2
    assert prefill["ray_actor_options"] == {
        "num_cpus": 1, "num_gpus": 1, "resources": {"fast": 1},
    }  # fmt: skip
    scaling = application.engine_options(chosen, Role.DECODE)["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 3)
    assert scaling["target_ongoing_requests"] == 5
    # Ray must not end a replica that still drains.
    assert prefill["graceful_shutdown_timeout_s"] > 7 + 10
    assert application.router_options(chosen)["num_replicas"] == 1


@pytest.mark.parametrize(
    ("loads", "wanted"), [({"a": 3.0, "b": 6.0}, 4.5), ({"a": 0.0}, 0.0), ({}, 7.0), (None, 7.0)]
)
def test_as_many_instances_as_there_are_requests_for(
    loads: dict[str, float] | None, wanted: float
) -> None:
    context = SimpleNamespace(
        aggregated_metrics=None if loads is None else {"load": loads},
        target_num_replicas=7,
        config=SimpleNamespace(target_ongoing_requests=2.0),
    )
    assert by_load(context) == (wanted, {})


def test_a_command_line_wins_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("model: f\nport: 1\ndecode: {replicas: 2, num_cpus: 3}\npd: {lease_s: 9}\n")
    chosen = from_words("--config", str(path), "--port", "2", "--decode-args", "-tp 2")
    assert (chosen.model, chosen.port, chosen.lease_s()) == ("f", 2, 9)
    assert (chosen.decode.replicas.most, chosen.decode.num_cpus) == (2, 3)
    assert chosen.decode.serve_args == ("-tp", "2")
    assert from_words("m", "--config", str(path), "--pd", "lease_s=4").lease_s() == 4
    assert from_words("m", "--pd", '{"lease_s": 4}').lease_s() == 4
    assert from_words("m", "--encode-args", "-tp 2").encode.replicas.most == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1]", "is no mapping"), ("a: [", "is no YAML"), ("a: " + "b" * (2 << 20), "is no mapping")],
)
def test_a_bad_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    with pytest.raises(PluginError, match=said):
        read_file(path)
    with pytest.raises(PluginError, match="cannot be read"):
        read_file(tmp_path / "none")


def test_a_dry_run_prints_what_serve_deploy_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["deploy", "--ray", "m", "--decode", "2:4", "--serve-args", "-tp 2", "--dry-run"]
    assert main.main(words) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["proxy_location"] == "Disabled"
    (one,) = printed["applications"]
    module, name = one["import_path"].split(":")
    assert getattr(sys.modules[module], name) is application.build
    assert read_settings(one["args"]) == from_words(*words[2:-1])


def test_the_example_is_what_a_dry_run_prints() -> None:
    text = (ROOT / "examples/ray/serve.yaml").read_text()
    (one,) = yaml.safe_load(text)["applications"]
    assert application.serve_config(read_settings(one["args"])) == yaml.safe_load(text)


def test_a_cluster_of_this_command_alone_cannot_outlive_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["deploy", "--ray", "m", "--detach", "--address", "local"]) == main.REFUSED
    assert "--detach: a cluster that --address local starts" in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main.main(["deploy", "--ray", "m"]) == main.REFUSED
    assert "pip install 'ray[serve]' on every node" in capsys.readouterr().err


def test_the_documentation_names_every_option_and_setting() -> None:
    text = (ROOT / "docs/deploy.md").read_text()
    parser = main.build_parser("deploy")
    actions = parser._subparsers._group_actions[0].choices["deploy"]._actions
    options = [one for action in actions for one in action.option_strings if one != "-h"]
    names = [option for option in options if option != "--help"]
    names += list(DeploySettings.model_fields)
    assert [name for name in names if f"`{name}" not in text] == []
