"""A LangGraph graph in a turn: its checkpoint is part of the conversation's state, its expensive calls are steps.

If the node dies in the middle, another one runs the graph again from the checkpoint with which the turn began, and is
given what is recorded. The new checkpoint is saved with the turn or not at all. An `interrupt()` becomes a question.

In this directory, then in a second terminal with the same environment::

    $ pip install convener langgraph
    $ convener serve langgraph_agent:app
    $ convener send essay1 "the sea" --create --user alice
    accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw
    $ convener tail essay1 --no-follow -n 1
         5  14:23:26  ask               {"ask_id": "t1.1", "prompt": "Publish 1 notes?", …
    $ curl -sS http://127.0.0.1:8000/api/conversations/essay1/answer --json '{"ask_id": "t1.1", "data": "yes"}'
    {"status":"accepted",…}
    $ convener tail essay1 --no-follow -n 2
         8  14:23:28  reply             publish 1 notes: done
         9  14:23:28  turn_done         {"settles": [1]}
"""

import base64
import operator
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.base import WRITES_IDX_MAP, BaseCheckpointSaver, CheckpointTuple
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from convener import Convener, Turn


class DictSaver(BaseCheckpointSaver[int]):
    """Keeps the latest checkpoint of a graph and of each subgraph in a dict of JSON values."""

    def __init__(self, kept: dict[str, Any]) -> None:
        super().__init__()
        self.kept = kept

    def pack(self, *value: Any) -> list[str]:
        kind, data = self.serde.dumps_typed(value)
        return [kind, base64.b64encode(data).decode()]

    def unpack(self, packed: list[str]) -> Any:
        return self.serde.loads_typed((packed[0], base64.b64decode(packed[1])))

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        thread, part = config["configurable"]["thread_id"], config["configurable"]["checkpoint_ns"]
        new = {"configurable": {"thread_id": thread, "checkpoint_ns": part, "checkpoint_id": checkpoint["id"]}}
        self.kept[part] = {"saved": self.pack(new, checkpoint, metadata), "writes": {}}
        return new

    async def aput_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        kept = self.kept[config["configurable"]["checkpoint_ns"]]["writes"]
        for number, (channel, value) in enumerate(writes):
            place = f"{task_path} {task_id} {WRITES_IDX_MAP.get(channel, number):06}"
            kept[place] = self.pack(task_id, channel, value)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        kept = self.kept.get(config["configurable"].get("checkpoint_ns", ""))
        if kept is None:
            return None
        writes = [self.unpack(packed) for _, packed in sorted(kept["writes"].items())]
        return CheckpointTuple(*self.unpack(kept["saved"]), pending_writes=writes)


class Essay(TypedDict):
    """The graph's state; notes of all turns add up."""

    topic: str
    notes: Annotated[list[str], operator.add]
    answer: str


async def service(order: str, key: str) -> str:
    """Stands in for a service that costs money; by `key`, the same in every attempt, it recognises a repetition."""
    return f"{order}: done"


app = Convener()


@app.agent
async def agent(turn: Turn) -> None:
    """Run the graph once for each message: take a note, and publish all of them if somebody agrees."""

    async def search(state: Essay) -> dict[str, Any]:
        return {"notes": [await turn.step("search", lambda: service(f"search {state['topic']}", turn.key))]}

    async def publish(state: Essay) -> dict[str, Any]:
        order = f"publish {len(state['notes'])} notes"
        agreed = interrupt(f"{order.capitalize()}?") == "yes"
        return {"answer": await turn.step("publish", lambda: service(order, turn.key)) if agreed else "not published"}

    builder: Any = StateGraph(Essay).add_sequence([search, publish]).add_edge(START, "search")
    graph = builder.compile(DictSaver(turn.state.setdefault("graph", {})))
    config, given = {"configurable": {"thread_id": turn.conversation.id}}, {"topic": turn.text}
    while "__interrupt__" in (result := await graph.ainvoke(given, config, durability="exit")):
        given = Command(resume=await turn.ask(result["__interrupt__"][0].value))
    await turn.reply({"text": result["answer"]})
