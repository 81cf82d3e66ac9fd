"""A person decides before something irreversible is done: the question waits for days, through crashes and deploys.

In this directory; `--data` keeps the question if the only node ends (a cluster keeps it anyway)::

    $ convener serve approval:app --data ./data

In a second terminal, with the same environment::

    $ convener send refund1 "30 EUR to Bob" --create --user alice
    accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw
    $ convener tail refund1 --no-follow -n 1
         4  14:23:26  ask               {"ask_id": "t1.1", "prompt": "Refund 30 EUR to Bob?", …

Any client may answer, at any node. What does not fit the schema, and what comes too late, is refused::

    $ export URL=http://127.0.0.1:8000/api/conversations/refund1/answer
    $ curl -sS $URL --json '{"ask_id": "t1.1", "data": "sure"}'
    {…"code":"invalid_answer"…}
    $ curl -sS $URL --json '{"ask_id": "t1.1", "data": {"approved": true}}'
    {"status":"accepted",…}
    $ convener tail refund1 --no-follow -n 3
         6  14:23:31  step              {"name": "refund", "number": 1, "result": "refunded 30 EUR to Bob"}
         7  14:23:31  reply             refunded 30 EUR to Bob
         8  14:23:31  turn_done         {"settles": [1]}
    $ cat refunds.txt
    30 EUR to Bob, as refund1/t1/refund/1
"""

from pathlib import Path

from convener import Convener, Turn
from convener.errors import AskExpired

DECISION = {
    "type": "object",
    "properties": {"approved": {"type": "boolean"}},
    "required": ["approved"],
}

app = Convener()


def refund(what: str, key: str) -> str:
    """Stands in for the bank, to which `key` is shown: it is the same in every attempt, so no refund is made twice."""
    with Path("refunds.txt").open("a", encoding="utf-8") as book:
        book.write(f"{what}, as {key}\n")
    return f"refunded {what}"


@app.agent
async def clerk(turn: Turn) -> None:
    """Ask, then act. While it waits, the conversation may leave memory; the turn is run again when the answer comes."""
    try:
        decision = await turn.ask(f"Refund {turn.text}?", schema=DECISION, timeout=7 * 86_400)
    except AskExpired:
        await turn.reply({"text": "nobody has decided within a week"})
        return
    if not decision["approved"]:
        await turn.reply({"text": "not refunded"})
        return
    done = await turn.step("refund", lambda: refund(turn.text, turn.key))
    await turn.reply({"text": done})
