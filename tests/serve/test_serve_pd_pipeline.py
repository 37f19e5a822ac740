"""Two pipeline stages on one side, one on the other, in both directions."""

import pytest

from tests import models
from tests.pd_servers import Pair, instances
from tests.serve.test_serve_pd_parallel import PLUGIN, hands_over

pytestmark = pytest.mark.serve

# vLLM's CPU worker makes its buffers between stages in a warm-up that eager mode leaves out.
STAGES = ("--pipeline-parallel-size", "2", "--no-enforce-eager", "-cc.backend=eager")


@pytest.fixture(scope="module")
def instances_of_two_and_one():
    with instances(models.tiny_llama(), (*PLUGIN, *STAGES), PLUGIN) as servers:
        yield servers


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["two to one", "one to two"])
def test_stages_take_their_layers(instances_of_two_and_one, order):
    hands_over(Pair(*(instances_of_two_and_one[i] for i in order)), order[0])
