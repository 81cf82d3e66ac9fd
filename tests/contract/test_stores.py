"""The contract, on every store."""

from __future__ import annotations

import pytest

from convener.testing import contract
from convener.testing.harness import HarnessFactory

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_contract(check: contract.Check, make_harness: HarnessFactory) -> None:
    await contract.run(check, make_harness)
