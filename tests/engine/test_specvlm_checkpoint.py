"""A drafter's checkpoint that lacks something."""

import pytest

from tests.engine.specvlm_engine import drafter, engine
from vllm_plugins.errors import PluginError

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("gate.fc2", r"gate\.fc2\.bias"),
        ("layers.0.self_attn.k_proj", r"layers\.0\.self_attn\.k_proj\.weight"),
        ("layers.", r"layers\.0\.input_layernorm\.weight"),
    ],
)
def test_weights_that_are_missing_are_named(tmp_path, left_out, named):
    from safetensors.torch import load_file, save_file
    from vllm.distributed import cleanup_dist_env_and_memory

    weights = load_file(drafter() / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((drafter() / "config.json").read_text())
    message = rf"--plugin specvlm: model: lacks weights, {named} among them; train it"
    try:
        with pytest.raises(PluginError, match=message), engine({"model": str(tmp_path)}):
            pass
    finally:
        cleanup_dist_env_and_memory()
