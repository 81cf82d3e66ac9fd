"""The smallest agent: it answers with what it was told, and counts.

In this directory::

    $ convener serve echo:app

In a second terminal, with the same environment::

    $ convener send chat1 hello --create --user alice
    accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw
    $ convener tail chat1 --no-follow
         1  14:23:26  open              epoch begins on …
         2  14:23:26  input             hello
         3  14:23:26  turn_started      {"attempt": 1, "reason": "new"}
         4  14:23:26  reply             1: hello
         5  14:23:26  turn_done         {"settles": [1]}
"""

from convener import Convener, Turn

app = Convener()


@app.agent
async def echo(turn: Turn) -> None:
    """Answer one message. The state is saved in the same append as the reply, so the count is exact."""
    turn.state["heard"] = heard = turn.state.get("heard", 0) + 1
    await turn.reply({"text": f"{heard}: {turn.text}"})
