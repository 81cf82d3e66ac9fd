"""A client that stops its own conversation is sent away by that, and is told the outcome before."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.sockets import ALICE, connected
from tests.gateway.support import Node
from tests.support.waiting import wait_until


async def test_the_answer_to_a_stop_comes_before_the_disconnect(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    close = served.manager.close_session
    async with connected(served.url, ALICE) as client:
        await client.until("joined")

        async def slow(*arguments: Any) -> Any:
            outcome = await close(*arguments)
            # By then the feed is about to disconnect the client.
            await wait_until(lambda: client.of("stopped"), "the client is told that it is over")
            return outcome

        monkeypatch.setattr(served.manager, "close_session", slow)
        assert await client.call("stop", {}) == {"outcome": "stopped"}
        assert await client.is_cut_off()
