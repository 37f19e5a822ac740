"""A drafter's checkpoint that lacks something."""

import pytest

from tests.engine.specvlm_engine import drafter, engine
from vllm_plugins.errors import PluginError

pytestmark = pytest.mark.engine


def test_weights_that_are_missing_are_named(tmp_path):
    from safetensors.torch import load_file, save_file
    from vllm.distributed import cleanup_dist_env_and_memory

    weights = load_file(drafter() / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("gate.fc2")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((drafter() / "config.json").read_text())
    message = r"--plugin specvlm: model: lacks weights, gate\.fc2\.bias among them; train it"
    try:
        with pytest.raises(PluginError, match=message), engine({"model": str(tmp_path)}):
            pass
    finally:
        cleanup_dist_env_and_memory()
