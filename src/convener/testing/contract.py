"""The contract of a store: what every implementation of `convener.store.base.Store` must do, as runnable checks.

For a store of your own::

    @pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
    async def test_my_store(check):
        await contract.run(check, my_harness)

where ``my_harness()`` makes a `Harness` (`convener.testing.harness`): several stores over one fresh set of data.
After each check everything is deleted the way the cluster deletes it, and nothing may be left (`.leaks`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Final

from convener.testing.contract_checks import (
    alarms,
    bus,
    conversations,
    intents,
    logs,
    membership,
    nodes,
    repair,
    retention,
    users,
)
from convener.testing.harness import Harness, HarnessFactory
from convener.testing.leaks import watched

Check = Callable[[Harness], Awaitable[None]]


def _checks(module: ModuleType) -> list[Check]:
    return [function for title, function in vars(module).items() if title.startswith("check_")]


CHECKS: Final[Sequence[Check]] = tuple(
    check
    for module in (conversations, intents, alarms, logs, retention, repair, users, membership, nodes, bus)
    for check in _checks(module)
)


def name(check: Check) -> str:
    """The check's name, for test ids."""
    return getattr(check, "__name__", str(check)).removeprefix("check_")


async def run(check: Check, factory: HarnessFactory) -> None:
    """Run one check on fresh data, then look for keys that nobody deletes.

    Raises:
        AssertionError: the store does not keep the contract.
    """
    async with factory() as harness, watched(harness) as noting:
        await check(noting)
