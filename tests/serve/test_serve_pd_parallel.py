"""Two ranks on one side, one on the other, in both directions; each instance has both roles."""

import pytest

from tests import models
from tests.pd_servers import Pair, instances, prompt
from vllm_plugins.kv_connectors.pd.reference import KEY

pytestmark = pytest.mark.serve

PLUGIN = ("--plugin", "pd:role=both,min_pull_tokens=1,stream_layers=true,lease_s=5")


@pytest.fixture(scope="module")
def instances_of_two_and_one():
    with instances(
        models.tiny_llama(), (*PLUGIN, "--tensor-parallel-size", "2"), PLUGIN
    ) as servers:
        yield servers


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["two to one", "one to two"])
def test_ranks_take_their_heads(instances_of_two_and_one, order):
    pair = Pair(*(instances_of_two_and_one[i] for i in order))
    for length in (33, 300, 900):
        tokens = prompt(length, order[0])
        params = pair.prefilled(tokens)
        assert len(params[KEY]["peers"]) == 2 - order[0]
        assert pair.decoded(tokens, params) == pair.colocated(tokens)
    long = prompt(700, 2 + order[0])
    assert pair.streamed(long, params[KEY]["peers"]) == pair.colocated(long)
    assert pair.decode.metric("vllm_plugins:pd_recomputed_total") == 0
    pair.await_empty(7)
