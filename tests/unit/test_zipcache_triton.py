"""ZipCache's Triton kernels, without a GPU: what they compute, and that they compile for one.

They run in Triton's interpreter, which is chosen when Triton is imported: so in another process.
"""

import copy

import pytest

from tests.models import tiny_llama
from tests.unit.test_hip_triton import FOLDER, run
from vllm_plugins.arguments import EngineArguments
from vllm_plugins.attention_backends.zipcache.plugin import (
    ZipCacheOptions,
    ZipCachePlugin,
    _unsupported_on_cuda,
)


@pytest.mark.parametrize("cases", ["pages ops", "attend", "backend"])
def test_cases(cases):
    files = (str(FOLDER / f"zipcache_triton_{name}.py") for name in cases.split())
    run(True, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)


def test_kernels_compile_for_hopper_without_spilling():
    run(False, "-m", "tests.unit.zipcache_triton_compile")


@pytest.fixture
def on_cuda(monkeypatch):
    """The same platform by another name, whose GPU is new enough."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    monkeypatch.setattr(
        type(current_platform), "has_device_capability", classmethod(lambda *_, **__: True)
    )


def test_blocks_are_large_enough_on_cuda(on_cuda):
    found = []
    for given in ({}, {"block_size": 128}):
        arguments = EngineArguments(given, {"block_size": None})
        ZipCachePlugin().configure(ZipCacheOptions(), arguments)
        found.append(arguments.get("block_size"))
    assert found == [64, 128]
    assert arguments.get("attention_backend").name == "CUSTOM"


@pytest.fixture
def config():
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(tiny_llama(layers=4)), dtype="float32", block_size=64)
    return copy.deepcopy(arguments.create_engine_config())


# The configuration comes first: it is made on the platform that there is.
def test_what_the_kernels_do_not_serve_is_refused(config, on_cuda):
    import torch

    assert [": ".join(x) for x in _unsupported_on_cuda(config)] == [
        "--dtype torch.float32: tensor cores multiply 16 bits: use bfloat16 or float16"
    ]
    config.model_config.dtype = torch.bfloat16
    assert _unsupported_on_cuda(config) == []
    config.parallel_config.enable_dbo = True
    config.model_config.get_head_size = lambda: 320
    assert [flag for flag, *_ in _unsupported_on_cuda(config)] == ["this model", "--enable-dbo"]
