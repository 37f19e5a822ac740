"""Runs ``vllm bench serve`` again and again in one process, which imports vLLM once.

Reads one JSON list of command-line arguments per line from standard input and answers each, when
the command has ended, with its exit code on a line of standard output. What the command itself
prints goes to standard error. On a small machine the import takes longer than many a trial.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from vllm_plugins.bench.vllm_command import name_cpu_build


def run_command(arguments: list[str]) -> int:
    """Run the ``vllm`` command once and return its exit code."""
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", *arguments]
    try:
        vllm_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        # The traceback is for the log; the parent learns of the failure by the code.
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Answer lines until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name_cpu_build()
    import vllm.entrypoints.cli.main  # noqa: F401  (while the first server starts)

    for line in sys.stdin:
        print(run_command(json.loads(line)), file=replies)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
