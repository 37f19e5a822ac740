"""Block holes, Dynamic-LLaVA, SpecVLM and EPD on model runner V2, without a GPU."""

import pytest

from tests.v2.elsewhere import run_on_v2

pytestmark = pytest.mark.engine

SELECTED = {
    "holes": ("engine/test_block_holes_engine.py",),
    "dynamic_llava": (
        "engine/test_dynamic_llava.py",
        "-k",
        "stock or batch or preemption or structured",
    ),
    "forgetting": ("engine/test_dynamic_llava_text.py", "-k", "equation_6 or preemption"),
    "forgetting-ahead": ("v2/forgetting_cases.py",),
    "freed-holes": ("engine/test_dynamic_llava_memory.py", "-k", "freed_blocks"),
    "epd": ("v2/epd_cases.py",),
    "specvlm": ("engine/test_specvlm.py", "-k", "answers and (off or text_only)"),
}


@pytest.mark.parametrize("arguments", SELECTED.values(), ids=SELECTED)
def test_on_v2(arguments):
    run_on_v2(*arguments)
