"""HiP and ZipCache on model runner V2, without a GPU."""

import pytest

from tests.v2.elsewhere import run_on_v2

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["hip", "zipcache"])
def test_on_v2(name):
    run_on_v2(f"v2/{name}_cases.py")
