"""Prefill on one engine and decode on another, both on model runner V2, without a GPU."""

import pytest

from tests.v2.elsewhere import run_on_v2

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_on_v2():
    run_on_v2("engine/test_pd_engines.py")
