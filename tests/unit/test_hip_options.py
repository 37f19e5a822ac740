"""HiP's options: what is refused, and what layers make of them."""

import pytest

from vllm_plugins.attention_backends.hip.plugin import _check_layers
from vllm_plugins.errors import PluginError
from vllm_plugins.registry import load, validate_options

STAGES = [{"chunk": 64, "keep": 512}, {"chunk": 8}]


def options(**values):
    return validate_options(load("hip"), values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top_k": 100}, "top_k=100 is not a multiple of the last chunk=8"),
        ({"sink_tokens": 12}, "sink_tokens=12 is not a multiple of chunk=8"),
        ({"refresh": [8, 4]}, "refresh=[8, 4] is not one number for each stage"),
        ({"refresh": [16, 6, 3]}, "refresh=[16, 6, 3]: each must divide the one before it"),
        ({"refresh": [16, 8, 0]}, "refresh=[16, 8, 0]: each must divide the one before it"),
        (
            {"overlap_tokens": 8},
            "overlap_tokens=8 is not between the longest refresh, 16, and the window, 1024",
        ),
        (
            {"per_layer": {"5": {"window_tokens": 128}}},
            "overlap_tokens=256 is not between the longest refresh, 16, and the window, 128",
        ),
        ({"per_layer": {"5": {"top_k": 12}}}, "top_k=12 is not a multiple of the last chunk=8"),
        ({"stages": [{"chunk": 24}], "refresh": [1]}, "stages: chunk=24 is not a power of two"),
        (
            {"stages": [{"chunk": 64, "keep": 100}, {"chunk": 8}], "refresh": [8, 4]},
            "stages: keep=100 is not a multiple of chunk=64",
        ),
        (
            {"stages": [{"chunk": 8, "keep": 64}, {"chunk": 8}], "refresh": [8, 4]},
            "stages: chunk=8 is not below chunk=8",
        ),
        (
            {"stages": [{"chunk": 8, "keep": 64}], "refresh": [8]},
            "stages: the last stage keeps top_k tokens, so it has no keep",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(values, reason):
    with pytest.raises(PluginError) as error:
        options(**values)
    assert reason in str(error.value)


def test_zero_refresh_is_named_before_division():
    with pytest.raises(PluginError, match="refresh"):
        options(refresh=[0, 0, 0])


def test_layers_have_plans_of_their_own():
    chosen = options(
        stages=STAGES, refresh=[8, 4], top_k=256, dense_layers=[0, -1],
        per_layer={"2": {"top_k": 64}, "-2": {"window_tokens": 2048}},
    )  # fmt: skip
    plans = [chosen.plan(i, 6) for i in range(6)]
    assert plans[0] is plans[5] is None
    assert [p.top_k for p in plans[1:5]] == [256, 64, 256, 256]
    assert [p.window for p in plans[1:5]] == [1024, 1024, 1024, 2048]
    assert [s.keep_chunks for s in plans[1].stages] == [8, 32]


def test_default_dense_layers_may_exceed_a_small_model():
    assert options().plan(1, 2) is None
    assert options().plan(3, 4) is not None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"per_layer": {"2": {"top_k": 64}}}, "per_layer=2: the layer is in dense_layers"),
        (
            {"dense_layers": [-1], "per_layer": {"5": {"top_k": 64}}},
            "per_layer=5: the layer is in dense_layers",
        ),
        (
            {"per_layer": {"4": {"top_k": 64}, "-2": {"top_k": 128}}},
            "per_layer=-2: it is layer 4 too",
        ),
        ({"dense_layers": [0, 6]}, "layer 6: the model has 6 layers"),
        ({"per_layer": {"-7": {"top_k": 64}}}, "layer -7: the model has 6 layers"),
    ],
)
def test_layers_that_an_option_cannot_be_for_are_refused(values, reason):
    with pytest.raises(PluginError) as error:
        _check_layers(options(**values), 6)
    assert reason in str(error.value)


def test_options_of_sparse_layers_are_taken():
    _check_layers(options(per_layer={"3": {"top_k": 64}, "-1": {"top_k": 128}}), 6)
    # The default names layers that a small model lacks.
    _check_layers(options(), 2)
