"""Socket.IO frames from outside: every frame becomes something that a handler can answer.

python-socketio raises on frames that it cannot read, which ends in its log and with a client that waits for ever,
and it lets clients send events named like its own. Here a bad frame turns into the event `MALFORMED` instead,
with its acknowledgement id where that could be read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import msgspec
from socketio import packet

from convener.errors import ConvenerError
from convener.gateway.jsontext import parse

MALFORMED: Final = "\0malformed"
"""Name of the event that stands for a bad frame; its argument says what was wrong. Clients cannot send it."""

_BINARY: Final = (packet.BINARY_EVENT, packet.BINARY_ACK)
# Names that mean something to python-socketio's own dispatch.
_RESERVED: Final = frozenset({"connect", "disconnect", "__disconnect_final", "*", MALFORMED})


class Codec:
    """JSON for python-socketio."""

    @staticmethod
    def dumps(value: Any, **_: Any) -> str:
        """Compact JSON; the options of the standard library's function do not matter."""
        return msgspec.json.encode(value).decode()

    @staticmethod
    def loads(text: str | bytes) -> Any:
        """Strict JSON. Raises `InvalidRequest`."""
        return parse(text)


class StrictPacket(packet.Packet):
    """A Socket.IO packet that can always be dispatched."""

    # What we send and accept is JSON; looking for bytes in every payload would cost a walk through it.
    uses_binary_events = False
    json = Codec

    def __init__(
        self,
        packet_type: int = packet.EVENT,
        data: Any = None,
        namespace: str | None = None,
        id: int | None = None,  # noqa: A002  (the library's name)
        binary: bool | None = None,
        encoded_packet: str | bytes | None = None,
    ) -> None:
        super().__init__(packet_type, data, namespace, id, binary)  # pyright: ignore[reportUnknownMemberType]
        if encoded_packet is not None:
            self.attachment_count = 0
            self._read(encoded_packet)

    def _read(self, text: str | bytes) -> None:
        problem = None
        if not isinstance(text, str) or not text:
            problem = "binary frames mean nothing here" if text else "an empty frame"
        else:
            try:
                self.decode(text)  # pyright: ignore[reportUnknownMemberType]
            except (ValueError, IndexError, TypeError) as error:
                problem = str(error)
            except ConvenerError as error:
                problem = error.detail
        self._settle(problem)

    def _settle(self, problem: str | None) -> None:
        """Make what was read dispatchable."""
        kind = self.packet_type
        if kind == packet.CONNECT:
            # The connect handler refuses what is no object.
            self.data = self.data if problem is None else problem
        elif kind == packet.DISCONNECT and problem is None:
            self.data = None
        elif problem is not None or not self._is_sound():
            if problem is None:
                problem = "binary payloads are not supported" if kind in _BINARY else "not an event"
            if kind in (packet.ACK, packet.BINARY_ACK):
                self.id = None
            self.packet_type = packet.EVENT
            self.data = [MALFORMED, problem]

    def _is_sound(self) -> bool:
        if self.packet_type == packet.ACK:
            return isinstance(self.data, list)
        return self.packet_type == packet.EVENT and _is_event(self.data)


def _is_event(data: object) -> bool:
    if not isinstance(data, list) or not data:
        return False
    name = cast("list[object]", data)[0]
    return isinstance(name, str) and name not in _RESERVED


def filter_frames(
    receive: Callable[[], Awaitable[Any]], on_malformed: Callable[[], None]
) -> Callable[[], Awaitable[Any]]:
    """An ASGI `receive` for Engine.IO that skips WebSocket frames which Engine.IO could not decode.

    Its reader ends with an exception on those, without telling anybody that the client is gone.
    """

    async def filtered() -> Any:
        while True:
            message = await receive()
            if message["type"] != "websocket.receive" or _is_frame(message.get("text")):
                return message
            on_malformed()

    return filtered


def _is_frame(text: str | None) -> bool:
    """Whether an Engine.IO frame is well-formed as far as Engine.IO itself looks at it."""
    if not text:
        return False
    # A message holds a Socket.IO packet, which begins with its type; everything else is a word or nothing.
    if text[0] == "4":
        return len(text) > 1 and text[1] in "0123456"
    return text[0] in "12356" and len(text) <= 16
