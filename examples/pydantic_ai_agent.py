"""A Pydantic AI agent whose model requests and tool calls are durable steps, and whose messages are the state.

If the node dies in the middle, another one runs the agent again from the beginning of the turn: what is recorded is
given back, and only what is not is done. So no finished tool call is made twice, and no finished request is paid twice.

In this directory (MODEL=test is Pydantic AI's own stand-in, which calls every tool once and needs no key)::

    $ pip install convener pydantic-ai-slim
    $ export MODEL=test
    $ convener serve pydantic_ai_agent:app

In a second terminal, with the same environment::

    $ convener send trip1 "Get me to Rome." --create --user alice
    accepted at position 1 as 4n5mBeiQvTTtsfwKWy7Jbw
    $ convener tail trip1 --no-follow
    …
         4  14:23:26  step              {"name": "model", "number": 1, …
         5  14:23:26  step              {"name": "find_flight", "number": 1, "result": {"value": "find a done"}}
         6  14:23:26  step              {"name": "book", "number": 1, "result": {"value": "book a done"}}
         7  14:23:26  step              {"name": "model", "number": 2, …
         8  14:23:26  reply             {"find_flight":"find a done","book":"book a done"}
         9  14:23:26  turn_done         {"settles": [1]}
"""

import os
from typing import Any

from pydantic_ai import Agent, ModelMessagesTypeAdapter, ModelResponse, ModelRetry, RunContext
from pydantic_ai.capabilities import AbstractCapability

from convener import Convener, Turn

MESSAGES = ModelMessagesTypeAdapter


class DurableTurn(AbstractCapability[Turn]):
    """Makes every model request and every tool call of an agent a step of the turn that it is given as `deps`."""

    async def wrap_model_request(self, ctx: RunContext[Turn], *, request_context: Any, handler: Any) -> ModelResponse:
        """Ask the model, unless its answer is recorded."""

        async def request() -> Any:
            return MESSAGES.dump_python([await handler(request_context)], mode="json")

        (response,) = MESSAGES.validate_python(await ctx.deps.step("model", request))
        assert isinstance(response, ModelResponse)
        return response

    async def wrap_tool_execute(
        self, ctx: RunContext[Turn], *, call: Any, tool_def: Any, args: dict[str, Any], handler: Any
    ) -> Any:
        """Call the tool, unless what came of it is recorded. "Try again" is an outcome like any other."""

        async def execute() -> dict[str, Any]:
            try:
                return {"value": await handler(args)}
            except ModelRetry as retry:
                return {"retry": retry.message}

        outcome = await ctx.deps.step(call.tool_name, execute)
        if "retry" in outcome:
            raise ModelRetry(outcome["retry"])
        return outcome["value"]


app = Convener()
travel = Agent(os.environ.get("MODEL", "test"), deps_type=Turn, capabilities=[DurableTurn()])


async def service(order: str, key: str) -> str:
    """Stands in for a service that costs money. `key` is the same in every attempt: it recognises a repetition."""
    return f"{order} done"


@travel.tool
async def find_flight(ctx: RunContext[Turn], city: str) -> str:
    """Find a flight to a city."""
    return await service(f"find {city}", ctx.deps.key)


@travel.tool
async def book(ctx: RunContext[Turn], flight: str) -> str:
    """Book a flight."""
    return await service(f"book {flight}", ctx.deps.key)


@app.agent
async def agent(turn: Turn) -> None:
    """Answer one message, with everything that was said before."""
    history = MESSAGES.validate_python(turn.state.get("messages", []))
    result = await travel.run(turn.text, deps=turn, message_history=history)
    turn.state["messages"] = MESSAGES.dump_python(result.all_messages(), mode="json")
    await turn.reply({"text": result.output})
