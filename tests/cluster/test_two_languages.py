"""Stock clients of two languages on two nodes in one conversation are told the same story."""

from __future__ import annotations

import pytest

from tests.cluster.checks import check_answered
from tests.cluster.clients import Clients
from tests.support.cluster import Cluster
from tests.support.jsclient import javascript_client, missing

LINES = 20


@pytest.mark.skipif(missing() is not None, reason=f"the JavaScript client cannot run: {missing()}")
async def test_python_and_javascript_clients_on_two_nodes_print_the_same_sequence(
    cluster: Cluster, clients: Clients
) -> None:
    cid, sent = "bilingual", dict[str, str]()
    python = await clients.join(cluster.url(0), cid, user_id="u")
    async with javascript_client(cluster.url(1), cid, "--user", "u") as javascript:
        await javascript.until("joined", lambda: javascript.of("joined"))
        for number in range(LINES):
            ident, text = f"m{number}", f"line {number}, and something beyond ASCII: žluťoučký kůň 🐎"
            sent[ident] = text
            if number % 2:
                answer = await javascript.call("message", {"message_id": ident, "data": {"text": text}})
            else:
                answer = await python.say(text, ident)
            assert answer == {"status": "accepted", "message_id": ident, "position": number + 1, "duplicate": False}
        await python.wait_for(LINES, "turn_done")
        check_answered(python.events, sent)
        await javascript.until("seen it all", lambda: len(javascript.of("event")) >= len(python.events))
        assert javascript.of("event") == python.events
        late = await clients.join(cluster.url(2), cid, user_id="u")
        assert late.events == python.events
    async with javascript_client(cluster.url(2), cid, "--user", "u", "--after", python.events[9]["cursor"]) as late_js:
        await late_js.until("joined", lambda: late_js.of("joined"))
        assert late_js.of("event") == python.events[10:]
