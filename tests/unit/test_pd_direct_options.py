"""transport=cuda_ipc: refused in one line where it cannot be."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import DeviceConfig, VllmConfig

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.pd.plugin import PdOptions, PdPlugin


def test_it_needs_cuda():
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with pytest.raises(PluginError) as caught:
        PdPlugin().check(PdOptions(role="decode", transport="cuda_ipc"), config)
    assert str(caught.value) == (
        "--plugin pd: transport=cuda_ipc: maps KV caches of CUDA devices, and this is cpu; "
        "use transport=auto"
    )


@pytest.mark.parametrize("transport", ["cuda_ipc", "shm"])
def test_it_does_not_reach_other_hosts(transport, tmp_path):
    with pytest.raises(ValueError, match=f"transport={transport} does not reach other hosts"):
        PdOptions(
            role="prefill", transport=transport, allow_remote=True, secret_file=tmp_path / "secret"
        )
