"""A store that a test can stop at a chosen call: hold it, lose it or its reply, let it land late or twice.

What `faults.FaultyStore` does at random, this does once, at the place that a counterexample names::

    steps = StepStore(store)
    release = steps.hold_reply("release")
    …
    await release.reached.wait()    # RELEASE has been applied, its caller does not know yet
    release.go()

Like there, nothing happens that a network could not do: a step is applied wholly or not at all, and a lost reply
looks like a lost command.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

from convener.errors import StoreUnavailable
from convener.store.base import Store

Mode = Literal["hold", "hold_reply", "lose", "lose_reply", "late", "repeat"]
When = Callable[..., bool]

PASSED_ON: Final = frozenset({"open", "close"})
"""The life of the store is not a step of the protocol."""


class Step:
    """One stopped call.

    Attributes:
        reached: set when the call has come to where it is stopped.
        arguments: what it was called with, positional ones first.
    """

    def __init__(self, name: str, mode: Mode, when: When) -> None:
        self.name = name
        self.mode: Mode = mode
        self.when = when
        self.reached = asyncio.Event()
        self.arguments: tuple[Any, ...] = ()
        self._go = asyncio.Event()
        self._command: Callable[[], Awaitable[Any]] | None = None

    def go(self) -> None:
        """Let a held call, or a held reply, go on."""
        self._go.set()

    async def land(self) -> Any:
        """Apply now what its caller has given up: the copy of the command that was still on its way."""
        assert self._command is not None, f"{self.name} was not called"
        return await self._command()

    async def pass_through(self, command: Callable[[], Awaitable[Any]], arguments: tuple[Any, ...]) -> Any:
        """Treat one call as the mode says."""
        self.arguments, self._command = arguments, command
        if self.mode in ("lose", "late"):
            self.reached.set()
            raise StoreUnavailable(f"{self.name} was lost")
        if self.mode == "hold":
            self.reached.set()
            await self._go.wait()
        reply = await command()
        if self.mode == "repeat":
            await command()
        self.reached.set()
        if self.mode == "lose_reply":
            raise StoreUnavailable(f"the reply to {self.name} was lost")
        if self.mode == "hold_reply":
            await self._go.wait()
        return reply


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


class StepStore:
    """Passes everything to `store`, but for the calls that were named. Each of these methods names the next call of
    a store's method whose arguments satisfy `when`; the call after it passes again.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._steps: list[Step] = []
        self.down: set[str] = set()
        """Methods that fail until they are taken out of here; ``*`` for all. Nothing is applied."""

    def _name(self, name: str, mode: Mode, when: When) -> Step:
        step = Step(name, mode, when)
        self._steps.append(step)
        return step

    def hold(self, name: str, when: When = _always) -> Step:
        """Stop the call before it is applied."""
        return self._name(name, "hold", when)

    def hold_reply(self, name: str, when: When = _always) -> Step:
        """Apply it, and keep the reply."""
        return self._name(name, "hold_reply", when)

    def lose(self, name: str, when: When = _always) -> Step:
        """Never apply it; the caller gets `StoreUnavailable`."""
        return self._name(name, "lose", when)

    def lose_reply(self, name: str, when: When = _always) -> Step:
        """Apply it; the caller gets `StoreUnavailable`."""
        return self._name(name, "lose_reply", when)

    def late(self, name: str, when: When = _always) -> Step:
        """The caller gets `StoreUnavailable` now; the command is applied when the test calls `Step.land`."""
        return self._name(name, "late", when)

    def repeat(self, name: str, when: When = _always) -> Step:
        """Apply it twice; the caller gets the first reply."""
        return self._name(name, "repeat", when)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if name in PASSED_ON or not inspect.iscoroutinefunction(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.down & {name, "*"}:
                raise StoreUnavailable(f"{name}: the store is away")
            for step in self._steps:
                if step.name == name and step.when(*args, **kwargs):
                    self._steps.remove(step)
                    arguments = (*args, *kwargs.values())
                    return await step.pass_through(lambda: value(*args, **kwargs), arguments)
            return await value(*args, **kwargs)

        return call
