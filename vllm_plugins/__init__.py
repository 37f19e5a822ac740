"""Serving techniques from the literature as plug-ins for an unmodified vLLM."""

from importlib import metadata

from vllm_plugins.activation import engine_args
from vllm_plugins.errors import PluginError

__version__ = metadata.version("vllm-plugins")
__all__ = ["PluginError", "__version__", "engine_args"]
