"""The package in `examples/third_party`, installed as a user would, serves under `--plugin`."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving import WORKER_PROCESS, served

pytestmark = pytest.mark.serve

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables under which the installed example is found."""
    folder = tmp_path_factory.mktemp("third_party")
    # A copy, because a build leaves files beside the sources.
    source = shutil.copytree(EXAMPLE, folder / "source")
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--no-index", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, **WORKER_PROCESS}


def test_the_example_is_small():
    files = [EXAMPLE / "pyproject.toml", *EXAMPLE.glob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 60


def test_it_is_listed_with_its_distribution(environment):
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "list"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ppas ")]
    assert "vllm-plugins-ppas 0.1.0" in line


def test_it_serves_and_decides(environment, tiny_llama):
    arguments = ("--max-num-batched-tokens", "256", "--max-num-seqs", "16")
    plugins = ("--plugin", "ppas:small_budget=32", "--plugin", "spf")
    with served(tiny_llama, *arguments, *plugins, environment=environment) as server:

        def complete(i: int) -> str:
            answer = server.openai.completions.create(
                model=server.model,
                prompt=[(i + j) % 500 for j in range(200)],
                max_tokens=20,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        alone = [complete(i) for i in range(8)]
        assert server.metric("vllm_plugins:ppas_small_steps_total") == 0
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(complete, range(8))) == alone
        assert server.metric("vllm_plugins:active", plugin="ppas") == 1
        assert server.metric("vllm_plugins:active", plugin="spf") == 1
        # Whether two prompts meet a decode is a matter of time; those above are cached besides.
        for first in range(100, 500, 50):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(complete, range(first, first + 8)))
            if server.metric("vllm_plugins:ppas_small_steps_total"):
                break
        assert server.metric("vllm_plugins:ppas_small_steps_total") > 0
