"""The real scheduler classes in virtual time: no model, no worker, a cost model for a clock.

:mod:`~vllm_plugins.simulator.engine` drives one scheduler as vLLM's engine core does;
:mod:`~vllm_plugins.simulator.simulate` compares policies on a workload.
"""
