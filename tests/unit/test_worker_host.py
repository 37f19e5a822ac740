"""The name of the worker host resolves to a class made from the platform's own worker."""

import inspect

import pytest

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import WORKER_HOST


@pytest.fixture(scope="module")
def host():
    """The module, which imports vLLM."""
    from vllm_plugins.engine import worker_host

    return worker_host


def resolve():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(WORKER_HOST)


def test_the_name_resolves_to_one_class_over_the_platforms_worker(host):
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    found = resolve()
    stock = resolve_obj_by_qualname(host.PLATFORM_WORKERS[current_platform.device_type])
    assert found is resolve()
    assert found.__mro__[1:3] == (host.WorkerHost, stock)
    assert f"{found.__module__}.{found.__name__}" == WORKER_HOST


def test_every_method_that_is_wrapped_is_one_of_the_worker(host):
    stock = resolve().__mro__[2]
    own = {
        name
        for name, member in vars(host.WorkerHost).items()
        if inspect.isfunction(member) and not name.startswith(("_", "plugin_"))
    }
    assert own == {
        "init_device", "load_model", "initialize_from_config", "execute_model", "sample_tokens",
        "shutdown",
    }  # fmt: skip
    assert all(callable(getattr(stock, name)) for name in own)


def test_a_platform_without_a_known_worker_is_refused(host, monkeypatch):
    monkeypatch.setattr(host, "PLATFORM_WORKERS", {})
    with pytest.raises(PluginError) as caught:
        resolve()
    assert str(caught.value) == (
        "--worker-cls: plug-ins have no worker for 'cpu'; use a CPU or CUDA build"
    )


def test_the_module_makes_nothing_else(host):
    with pytest.raises(AttributeError, match=r"has no attribute 'PlugInWorker'"):
        host.PlugInWorker  # noqa: B018
