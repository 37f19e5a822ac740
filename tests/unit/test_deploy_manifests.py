"""Manifests and the compose file are what Kubernetes and Compose take, and fit together."""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml

from vllm_plugins.activation import _add_flag
from vllm_plugins.cli import main
from vllm_plugins.cli.route import read_settings
from vllm_plugins.deploy.join import _parser
from vllm_plugins.registry import load, validate_options
from vllm_plugins.secret_file import LEAST_BYTES
from vllm_plugins.spec import parse_specs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMPOSE = EXAMPLES / "compose/compose.yaml"
OBJECTS: list[dict[str, Any]] = [
    one
    for path in sorted(EXAMPLES.glob("kubernetes/*.yaml"))
    for one in yaml.safe_load_all(path.read_text())
]
WORKLOADS = {one["metadata"]["name"]: one for one in OBJECTS if "template" in one.get("spec", {})}
SERVICES = {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == "Service"}
POLICIES = {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == "NetworkPolicy"}


def name_of(one: dict[str, Any]) -> str:
    return f"{one['kind']}-{one['metadata']['name']}"


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("manifest", OBJECTS, ids=name_of)
def test_manifests_are_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_check_of_manifests_can_fail() -> None:
    broken = WORKLOADS["decode"] | {"spec": WORKLOADS["decode"]["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def container(name: str) -> dict[str, Any]:
    (one,) = WORKLOADS[name]["spec"]["template"]["spec"]["containers"]
    return one


def plugins_of(command: list[str], **variables: str) -> dict[str, dict[str, Any]]:
    """Return the plug-ins of a `vllm serve` line, validated, with variables in place."""
    flag = _add_flag(argparse.ArgumentParser(allow_abbrev=False))
    texts = [str(text) for text in flag.parse_known_args(command)[0].plugin]
    for name, value in variables.items():
        texts = [text.replace(f"$({name})", value) for text in texts]
    specs = {spec.name: spec.options for spec in parse_specs(texts)}
    for name, options in specs.items():
        validate_options(load(name), options)
    return specs


@pytest.mark.parametrize("role", ["encode", "prefill", "decode"])
def test_pods_run_an_instance_of_their_role(role: str) -> None:
    one = container(role)
    joins = _parser().parse_args(one["args"])
    assert (joins.role, joins.url) == (role, f"http://$(POD_NAME).{role}:8100")
    assert joins.router == "http://router-members:8000"
    assert WORKLOADS[role]["spec"]["serviceName"] == role in SERVICES
    grace = WORKLOADS[role]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= joins.drain_s + 15
    assert joins.command[:2] == ["vllm", "serve"]
    found = plugins_of(joins.command, POD_IP="10.0.0.7")
    roles = {name: options["role"] for name, options in found.items()}
    images = "encode" if role == "encode" else "prefill"
    assert roles == ({} if role == "encode" else {"pd": role}) | {"epd": images}
    for options in found.values():
        assert options["allow_remote"] is True or options["allow_remote"] == "true"
        assert options["secret_file"] == "/secrets/wire.secret"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert one[probe]["httpGet"]["path"] == "/health"


def test_the_router_knows_the_first_pod_of_each_role() -> None:
    one = container("router")
    words = [*one["command"][1:], *one["args"]]
    chosen = read_settings(main.build_parser("route").parse_args(words))
    chosen.check()
    assert chosen.prefill == ("http://prefill-0.prefill:8100",)
    assert chosen.decode == ("http://decode-0.decode:8100",)
    assert chosen.encode == ("http://encode-0.encode:8100",)
    assert WORKLOADS["router"]["spec"]["replicas"] == 1
    grace = WORKLOADS["router"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > chosen.drain_s


def test_services_select_their_pods() -> None:
    for service in SERVICES.values():
        selected = service["spec"]["selector"].items()
        assert any(
            selected <= one["spec"]["template"]["metadata"]["labels"].items()
            for one in WORKLOADS.values()
        )


def allowed(policy: str, port: int) -> list[set[str]]:
    """Return the roles that each rule of a policy lets in at a port."""
    rules = POLICIES[policy]["spec"]["ingress"]
    return [
        roles_of(rule["from"])
        for rule in rules
        if any(p["port"] <= port <= p.get("endPort", p["port"]) for p in rule["ports"])
    ]


def roles_of(sources: list[dict[str, Any]]) -> set[str]:
    found = set()
    for source in sources:
        selector = source["podSelector"]
        found.add(selector.get("matchLabels", {}).get("role"))
        for one in selector.get("matchExpressions", []):
            found |= set(one["values"]) if one["key"] == "role" else set()
    return found - {None}


def wire_port(role: str, plugin: str) -> int:
    command = _parser().parse_args(container(role)["args"]).command
    options = plugins_of(command, POD_IP="10.0.0.7")[plugin]
    assert options["bind_host"] == "10.0.0.7"
    return int(options["port"])


def test_only_who_fetches_and_the_router_reach_the_wire() -> None:
    wire = wire_port("prefill", "pd")
    assert allowed("prefill", wire) == [{"decode", "router"}]
    assert allowed("encode", wire_port("encode", "epd")) == [{"prefill", "decode"}]
    assert {one: allowed(one, 8100) for one in ("encode", "prefill", "decode")} == {
        "encode": [{"router"}], "prefill": [{"router"}], "decode": [{"router"}],
    }  # fmt: skip
    assert allowed("decode", wire) == []
    # Every pod is under a policy that closes what it does not open.
    for name, one in WORKLOADS.items():
        selector = POLICIES[name]["spec"]["podSelector"]["matchLabels"]
        assert selector == one["spec"]["selector"]["matchLabels"]
        assert POLICIES[name]["spec"]["policyTypes"] == ["Ingress"]


def test_the_example_of_a_secret_is_refused_until_replaced() -> None:
    (secret,) = [one for one in OBJECTS if one["kind"] == "Secret"]
    assert len(secret["stringData"]["wire.secret"]) < LEAST_BYTES
    assert len(secret["stringData"]["admin.key"]) < 16
    files = " ".join(word for name in WORKLOADS for word in container(name)["args"])
    for name in secret["stringData"]:
        assert f"/secrets/{name}" in files


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def test_the_compose_file_is_valid() -> None:
    # As a mapping, with YAML's merge keys resolved, which the package's own reader does not know.
    read = compose_spec.PyCompose.from_json(json.dumps(compose()))
    read.validate()
    names = {"encode", "prefill", "decode-1", "decode-2", "router"}
    assert set(read.service_names()) == names


def test_the_check_of_compose_files_can_fail() -> None:
    broken = compose()
    broken["services"]["router"]["restarts"] = "always"
    with pytest.raises(ValueError, match="restarts"):
        compose_spec.PyCompose.from_json(json.dumps(broken))
    missing = compose()
    del missing["networks"]
    with pytest.raises(ValueError, match="network"):
        compose_spec.PyCompose.from_json(json.dumps(missing)).validate()


def test_containers_reach_each_other_by_their_names() -> None:
    services = compose()["services"]
    chosen = read_settings(main.build_parser("route").parse_args(services["router"]["command"][1:]))
    chosen.check()
    assert chosen.prefill == ("http://prefill:8100",)
    assert chosen.decode == ("http://decode-1:8100", "http://decode-2:8100")
    assert chosen.encode == ("http://encode:8100",)
    for url in (*chosen.prefill, *chosen.decode, *chosen.encode):
        name = re.fullmatch(r"http://([\w-]+):8100", url)[1]
        role, found = name.split("-")[0], plugins_of(services[name]["command"])
        if role != "encode":
            assert found["pd"]["role"] == role
        assert found["epd"]["role"] == ("encode" if role == "encode" else "prefill")
        assert {one["secret_file"] for one in found.values()} == {"/run/secrets/wire"}
        assert "ports" not in services[name]
    address = plugins_of(services["encode"]["command"])["epd"]["bind_host"]
    assert services["encode"]["networks"]["instances"]["ipv4_address"] == address
    (subnet,) = compose()["networks"]["instances"]["ipam"]["config"]
    assert ipaddress.ip_address(address) in ipaddress.ip_network(subnet["subnet"])
    assert plugins_of(services["prefill"]["command"])["pd"]["advertise_host"] == "prefill"
    assert services["router"]["ports"] == ["127.0.0.1:8000:8000"]
    for one in services.values():
        assert set(one["secrets"]) <= set(compose()["secrets"])
