"""Model runner V2 without a GPU: vLLM's own, the worker host and its mechanisms, and KVShare.

What the tests of other files compare with is then stock vLLM on V2 as well.
"""

import pytest

from tests.v2.elsewhere import run_on_v2

pytestmark = pytest.mark.engine

SELECTED = {
    "runner": ("v2/runner_cases.py",),
    "asynchronous": ("v2/async_cases.py",),
    "partial-forward": ("engine/test_partial_forward.py", "-k", "llama-block32-float32 or host"),
    "kvshare": ("engine/test_kvshare_neutral.py", "-k", "recomputed_equals or aborts or decodes"),
}


@pytest.mark.parametrize("arguments", SELECTED.values(), ids=SELECTED)
def test_on_v2(arguments):
    run_on_v2(*arguments)
