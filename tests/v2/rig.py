"""A pytest plug-in that runs engines on model runner V2, without a GPU.

    python -m pytest -p tests.v2.rig tests/engine/test_partial_forward.py

V2 is what vLLM runs on CUDA unless told otherwise. vLLM's CPU build has it too and chooses it where
it is asked to and Triton has a backend named `cpu`; what CUDA has of memory, streams and events it
replaces itself. All that is missing here is that backend. `interpreted_triton` is one that has
kernels interpreted: everything else, the runner with its kernels, states, block tables and sampler,
is vLLM's own, unmodified. Servers and workers that tests start inherit it.

What this cannot show: compiled kernels, graphs, and streams that overlap. Steps are scheduled ahead
only in `async_cases.py` and what takes its fixture, for vLLM's CPU platform turns that off.
"""

import dataclasses
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Before anything imports Triton or vLLM.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Where entry points are looked for, of which the backend is one.
sys.path.append(str(FOLDER))


def pytest_configure():
    """Stop where vLLM would have no kernels; mend how they are interpreted, and halve its time."""
    from triton.backends import backends
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    assert backends["cpu"].driver.is_active()
    # Each sum of 32-bit integers is otherwise computed again in 64 to see that it fits.
    interpreter_builder.options = dataclasses.replace(
        interpreter_builder.options, sanitize_overflow=False
    )
    interpreter_builder.create_splat = _splat_of(interpreter_builder)
    prepare_and_call, prepared = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        """Call a function of a kernel, whose module has been prepared once."""
        if self.fn.__module__ in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn.__module__)
        return prepare_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def _splat_of(builder):
    """Return how the builder of interpreted kernels repeats a scalar, truth values among them.

    Triton 3.9 makes integers of what comparing two scalars gives, and then takes them for no mask.
    """
    import numpy as np
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    splat = builder.create_splat

    def create_splat(shape, scalar):
        if scalar.data.dtype == np.bool_:
            return TensorHandle(np.full(shape.shape, scalar.data), language.int1)
        return splat(shape, scalar)

    return create_splat
