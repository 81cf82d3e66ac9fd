"""Answers that are put together from their pieces, as clients do it, and compared with the reply in the log."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from tests.support.servers import Server


class Answers:
    """The answers of one conversation, of text parts, from their pieces.

    Args:
        repeats: whether a piece may come twice, as it does in the store when a write had an unknown outcome.
    """

    def __init__(self, *, repeats: bool) -> None:
        self._repeats = repeats
        self._attempts: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        """Turn → what is there of its latest attempt."""

    def begin_anew(self) -> None:
        """Somebody who has just come gets what there is so far at once."""
        self.texts.clear()

    def take(self, piece: Mapping[str, Any]) -> None:
        """The next piece: it goes on where the text ends, or begins the text of a higher attempt."""
        turn, attempt, offset, data = piece["turn"], piece["attempt"], piece["offset"], piece["data"]
        known = self._attempts.get(turn, 0)
        assert attempt >= known, f"{piece} comes after pieces of attempt {known}"
        if attempt > known:
            self._attempts[turn], self.texts[turn] = attempt, ""
        text = self.texts.setdefault(turn, "")
        if self._repeats and text[offset : offset + len(data)] == data:
            return
        assert offset == len(text), f"{piece} comes after {text!r}"
        self.texts[turn] = text + data


def check_deltas(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
    """A client was shown pieces without gaps and repeats, and each answer begins as its pieces say.

    Returns:
        how many answers it was shown whole before they were done.
    """
    answers, whole, done = Answers(repeats=False), 0, set[str]()
    for name, payload in shown:
        if name == "joined":
            answers.begin_anew()
        elif name == "delta":
            assert payload["turn"] not in done, f"{payload} comes after the end of its turn"
            answers.take(payload)
        elif name == "event" and payload["kind"] == "reply":
            text, reply = answers.texts.get(payload["turn"]), payload["data"]["text"]
            assert text is None or reply.startswith(text), f"{payload} was shown as {text!r} before"
            whole += text == reply
        elif name == "event" and payload["kind"] == "turn_done":
            done.add(payload["turn"])
    return whole


class Listener:
    """Hears the channels of conversations, outside of all nodes, and what their nodes write there of answers."""

    def __init__(self, server: Server, cids: Collection[str]) -> None:
        self._client = server.client()
        self._pubsub = self._client.pubsub()  # pyright: ignore[reportUnknownMemberType]
        self._seqs = dict.fromkeys(cids, 0)
        self._epochs = dict.fromkeys(cids, 0)
        self.answers = {cid: Answers(repeats=True) for cid in cids}
        channels = {f"{{convener:c:{cid}}}": cid for cid in cids}
        self._cids = {name.encode(): cid for name, cid in channels.items()}
        self._pubsub.ssubscribe(*channels)

    def close(self) -> None:
        """Hang up."""
        self._pubsub.close()
        self._client.close()

    def has_heard(self, cid: str, seq: int) -> bool:
        """Whether everything up to this entry of the log has been heard."""
        while (message := cast("dict[str, Any] | None", self._pubsub.get_message())) is not None:
            if message["type"] == "smessage":
                self._take(self._cids[message["channel"]], json.loads(message["data"]))
        return self._seqs[cid] >= seq

    def _take(self, cid: str, publication: dict[str, Any]) -> None:
        if publication["t"] not in ("log", "piece"):
            return
        assert publication["epoch"] >= self._epochs[cid], f"{cid}: an older owner after a newer one: {publication}"
        self._epochs[cid] = publication["epoch"]
        if publication["t"] == "piece":
            for piece in publication["pieces"]:
                self.answers[cid].take(piece)
        else:
            # Large entries are only announced.
            self._seqs[cid] = publication["seq"] + len(publication.get("events", ())) + publication.get("n", 0) - 1
