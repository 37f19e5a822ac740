"""What this package relies on in vLLM, written down, checked and tried on every supported version.

Authors of other plug-ins can run the same checks against the vLLM that they have installed::

    from vllm_plugins.compat import CONTRACTS, check_contracts

    for broken in check_contracts(CONTRACTS):
        print(broken)

or write a table of :class:`Contract` of their own and check that.
"""

from vllm_plugins.compat.contract import Broken, Contract, check_contracts
from vllm_plugins.compat.contracts import CONTRACTS

__all__ = ["CONTRACTS", "Broken", "Contract", "check_contracts"]
