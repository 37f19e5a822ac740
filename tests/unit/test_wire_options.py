"""Options of plug-ins whose instances reach each other: refusals and help."""

import pytest
from pydantic import ValidationError

from vllm_plugins.cli.describe import option_table
from vllm_plugins.kv_connectors.epd.plugin import EpdOptions
from vllm_plugins.kv_connectors.pd.plugin import PdOptions
from vllm_plugins.wire.options import ListenerOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bind_host": "10.0.0.1"}, "bind_host=10.0.0.1 needs allow_remote=true"),
        ({"advertise_host": "gpu7"}, "advertise_host=gpu7 needs allow_remote=true"),
        ({"allow_remote": True}, "allow_remote=true needs secret_file, which all servers share"),
        (
            {"bind_host": "0.0.0.0", "allow_remote": True, "secret_file": "s"},
            "bind_host=0.0.0.0 is no address to connect to; set advertise_host",
        ),
    ],
)
def test_hosts_that_the_operator_did_not_allow_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        PdOptions(role="prefill", **options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_leave(host):
    options = PdOptions(role="prefill", bind_host=host)
    options.check_reach("bind_host", "advertise_host")


def test_with_leave_and_a_secret_any_host_will_do():
    remote = {"allow_remote": True, "secret_file": "s"}
    PdOptions(role="prefill", bind_host="0.0.0.0", advertise_host="gpu7", **remote)
    EpdOptions(role="encode", bind_host="10.0.0.1", **remote)


@pytest.mark.parametrize("options", [PdOptions, EpdOptions])
def test_each_plugin_says_what_they_mean_and_they_stand_last(options):
    table = {row["name"]: row for row in option_table(options)}
    shared = list(options.meanings)
    assert set(ListenerOptions.model_fields) <= set(shared)
    assert list(table)[-len(shared) :] == shared
    assert next(iter(table)) == "role"
    for name, text in options.meanings.items():
        assert table[name]["description"] == text
    assert (table["port"]["bounds"], table["port"]["default"]) == (">= 0, <= 65535", 0)
