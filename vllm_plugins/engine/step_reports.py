"""What a plug-in's part in the worker tells its part in the scheduler with each step's result.

A report travels as an attribute of vLLM's own result, so it takes no message, no connector and no
wait of its own. On a device it is begun behind the step and read where vLLM waits for the step's
tokens, in the thread in which it does. Of several ranks that one is heard whose result vLLM takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

# Reads what a step has to tell, given its result, once that is on the host.
Report: TypeAlias = "Callable[[ModelRunnerOutput], Any]"

ATTRIBUTE = "plugin_reports"
"""Of a result: what each plug-in tells, by its name."""


class ReportingOutput(AsyncModelRunnerOutput):
    """A result that is on its way to the host, with reports that are too.

    Args:
        output: vLLM's own.
        reports: By the name of the plug-in.
    """

    def __init__(self, output: AsyncModelRunnerOutput, reports: Mapping[str, Report]) -> None:
        self._output = output
        self._reports = reports

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the result with vLLM's own method, and return it with the reports."""
        return _reported(self._output.get_output(), self._reports)


def with_reports(output: Any, reports: Mapping[str, Report]) -> Any:
    """Return a step's result with reports.

    Args:
        output: vLLM's result, perhaps on its way; anything else is returned as it is.
        reports: By the name of the plug-in.
    """
    if not reports:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return ReportingOutput(output, reports)
    return _reported(output, reports) if isinstance(output, ModelRunnerOutput) else output


def _reported(output: ModelRunnerOutput, reports: Mapping[str, Report]) -> ModelRunnerOutput:
    # Every step without requests has the empty one, and nothing to tell.
    if output is not EMPTY_MODEL_RUNNER_OUTPUT:
        setattr(output, ATTRIBUTE, {name: report(output) for name, report in reports.items()})
    return output


def reports_of(output: Any) -> Mapping[str, Any]:
    """Return what plug-ins tell with a result, by their names."""
    reports: Mapping[str, Any] = getattr(output, ATTRIBUTE, {})
    return reports
