"""What an agent may say of itself besides how it answers: the form of its state, what it does after a crash."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import msgspec

from convener.errors import ConfigurationError, InvalidRequest
from convener.manager.jsontext import to_json

if TYPE_CHECKING:
    from convener.manager.context import RecoveryMode
    from convener.manager.conversation import Conversation
    from convener.manager.loops import LoopFunction
    from convener.manager.turn import Input

VERSION: Final = "$version"
STATE: Final = "$state"

Migrate = Callable[[int, dict[str, Any]], dict[str, Any]]
"""``f(version, data)``: the state as an older version of the agent wrote it, as the present one wants it."""


class Codec(Protocol):
    """The form of an agent's state. `decode` of None is the state of a new conversation."""

    def decode(self, raw: bytes | None) -> Any: ...

    def encode(self, state: Any, limit: int) -> bytes:
        """Raises `InvalidRequest`, `PayloadTooLarge`."""
        ...


class DictCodec:
    """A plain JSON object."""

    def decode(self, raw: bytes | None) -> dict[str, Any]:
        """The state. Raises `msgspec.MsgspecError`, `ValueError`."""
        state = msgspec.json.decode(raw or b"{}", type=dict[str, Any])
        if state.keys() == {VERSION, STATE}:
            # What has no version is older than all that have: as any older version, it must not spoil the newer one's.
            raise ValueError(f"the state is of version {state[VERSION]}, the agent's has none")
        return state

    def encode(self, state: Any, limit: int) -> bytes:
        """Its text."""
        if not isinstance(state, dict):
            raise InvalidRequest("the state must be a JSON object")
        return to_json(cast("dict[str, Any]", state), limit, "the state").encode()


class ModelCodec:
    """A msgspec struct, a dataclass or a pydantic model, with a version.

    Args:
        model: its class; made without arguments for a new conversation.
        version: of the model; written with the state.
        migrate: makes the data of an older version fit; without it, data of another version is refused.
    """

    def __init__(self, model: type[Any], version: int = 1, migrate: Migrate | None = None) -> None:
        self._is_pydantic = hasattr(model, "model_validate") and hasattr(model, "model_dump")
        is_struct = issubclass(model, msgspec.Struct)
        if not (self._is_pydantic or is_struct or dataclasses.is_dataclass(model)):
            raise ConfigurationError(f"the state {model.__name__} is no msgspec.Struct, dataclass or pydantic model")
        if isinstance(version, bool) or not isinstance(cast("object", version), int) or version < 1:
            raise ConfigurationError("the version of a state must be a number from 1")
        try:
            model()
        except Exception as error:
            raise ConfigurationError(
                f"the state {model.__name__} cannot be made without arguments, as a new conversation needs it: {error}"
            ) from error
        self._model: Any = model
        self._version = version
        self._migrate = migrate

    def decode(self, raw: bytes | None) -> Any:
        """The state. Raises `ValueError` (`msgspec.MsgspecError`, pydantic's errors), or whatever `migrate` raises."""
        if raw is None:
            return self._model()
        held = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        # What was written without a model is as version 0 wrote it.
        version, text = 0, raw
        if held.keys() == {VERSION, STATE}:
            version, text = msgspec.json.decode(held[VERSION], type=int), bytes(held[STATE])
        if version != self._version:
            if self._migrate is None or version > self._version:
                raise ValueError(f"the state is of version {version}, the agent's is {self._version}")
            text = msgspec.json.encode(self._migrate(version, msgspec.json.decode(text)))
        # From text, not from what is decoded already: keys that are no strings, times, and the like come back as such.
        if self._is_pydantic:
            return self._model.model_validate_json(text)
        return msgspec.json.decode(text, type=self._model)

    def encode(self, state: Any, limit: int) -> bytes:
        """Its text."""
        if not isinstance(state, self._model):
            raise InvalidRequest(f"the state must be a {self._model.__name__}, not a {type(state).__name__}")
        try:
            data = state.model_dump(mode="json") if self._is_pydantic else state
        except Exception as error:
            raise InvalidRequest(f"the state cannot be written: {error}") from error
        return to_json({VERSION: self._version, STATE: data}, limit, "the state").encode()


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A turn that was cut off when its node went down: what `@app.on_recover` is asked about.

    Attributes:
        turn: its id; `attempt` how often it was begun.
        steps: names of the steps that are finished, in the order of the log.
    """

    conversation: Conversation
    turn: str
    input: Input
    attempt: int
    steps: tuple[str, ...] = ()


Recover = Callable[[Interrupted], Awaitable["RecoveryMode | None"]]


@dataclass(frozen=True, slots=True)
class Traits:
    """What an agent says of itself.

    Attributes:
        codec: the form of its state.
        recover: decides what becomes of a cut-off turn; None leaves it to the setting `recovery`.
        loop: what runs as long as a conversation is loaded (`@app.loop`), and takes its turns.
        hibernates: whether its conversations may leave memory when they are idle.
        keeps_running: whether a conversation that was loaded on a node that went down is loaded again, though nothing
            is unanswered.
    """

    codec: Codec = field(default_factory=DictCodec)
    recover: Recover | None = None
    loop: LoopFunction | None = None
    hibernates: bool = True
    keeps_running: bool = False


def traits_of(agent: Any) -> Traits:
    """An agent's traits; it need not have any."""
    found = getattr(agent, "traits", None)
    return found if isinstance(found, Traits) else Traits()
