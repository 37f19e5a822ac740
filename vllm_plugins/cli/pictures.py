"""The drawing library, which only some commands need and not every user has."""

from __future__ import annotations

from typing import Any

from vllm_plugins.errors import PluginError


def pyplot() -> Any:
    """Return matplotlib.pyplot on its file-only backend.

    Raises:
        PluginError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise PluginError(
            "picture", "matplotlib is not installed", "pip install 'vllm-plugins[tools]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
