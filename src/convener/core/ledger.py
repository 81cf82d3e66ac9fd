"""What earlier attempts of a turn have recorded, and how a new attempt is matched with it.

A turn that is repeated runs the agent's code again. Its *steps* are given back from the record, matched by (name,
how many of that name), so that steps that run at the same time need no order among them. Its *outputs* (`reply`,
`emit`) are numbered within the turn: those that are in the log are not appended again. Its *questions* are matched by
what they ask, so that answers never get mixed up, whatever else the turn does at the same time. Code that changed
between the attempts is found out where it can no longer be matched, and is an error: a wrong answer would be worse.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, cast

STEP: Final = "step"
ASK: Final = "ask"
ANSWER: Final = "answer"


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step: the `number`th (from 1) of its name, and its result or its error ``{type, message}``."""

    name: str
    number: int
    result: Any = None
    error: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was asked: its id, and the prompt and the schema that it was asked with."""

    ask_id: str
    prompt: Any = None
    schema: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a question. `expired`: nobody has answered in time."""

    data: Any = None
    expired: bool = False


@dataclass(slots=True)
class Record:
    """What the log has of a turn between its start and its end: finished steps, the kinds of its outputs, questions,
    and answers by question.
    """

    steps: list[Step] = field(default_factory=list[Step])
    outputs: list[str] = field(default_factory=list[str])
    asked: list[Asked] = field(default_factory=list[Asked])
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])

    def note(self, kind: str, data: Any) -> None:
        """An entry of the turn, in the order of the log. A damaged one is passed over: it is done again."""
        if kind not in (STEP, ASK, ANSWER):
            self.outputs.append(kind)
        elif isinstance(data, dict):
            fields = cast("dict[str, Any]", data)
            name, number, ask_id = fields.get("name"), fields.get("number"), fields.get("ask_id")
            if kind == STEP and isinstance(name, str) and isinstance(number, int):
                self.steps.append(Step(name, number, fields.get("result"), fields.get("error")))
            elif kind == ASK and isinstance(ask_id, str):
                self.asked.append(Asked(ask_id, fields.get("prompt"), fields.get("schema")))
            elif kind == ANSWER and isinstance(ask_id, str):
                self.answers.setdefault(ask_id, Answer(fields.get("data"), fields.get("expired") is True))


def _number(asked: Asked) -> int:
    """The number of a question within its turn, the last part of its id; 1 if it cannot be read."""
    digits = asked.ask_id.rpartition(".")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else 1


class Mismatch(Exception):
    """The code of this attempt does not fit what an earlier one has recorded."""


class Ledger:
    """The record of one turn, and how far this attempt has come in it."""

    def __init__(self, record: Record | None = None) -> None:
        record = record or Record()
        self._steps = {(step.name, step.number): step for step in record.steps}
        self._unused = set(self._steps)
        self._asked: Counter[str] = Counter()
        self._outputs = list(record.outputs)
        self._written = 0
        self._questions = list(record.asked)
        # Questions that are asked at the same time may be recorded in any order, the first of them never.
        self._questions_asked = max((_number(asked) for asked in record.asked), default=0)

    @property
    def is_durable(self) -> bool:
        """Whether anything of the turn is in the log already."""
        return bool(self._steps or self._outputs or self._questions_asked)

    def ask(self, name: str) -> tuple[int, Step | None]:
        """The next step of this name: its number, and its record if it is finished."""
        self._asked[name] += 1
        number = self._asked[name]
        self._unused.discard((name, number))
        return number, self._steps.get((name, number))

    def question(self, prompt: Any, schema: Any) -> Asked | None:
        """The earliest recorded question that asks this and is not matched yet; None if it has to be asked."""
        for i, asked in enumerate(self._questions):
            if (asked.prompt, asked.schema) == (prompt, schema):
                return self._questions.pop(i)
        return None

    def next_question(self) -> int:
        """The number of a question that has to be asked, from 1: no two of a turn have the same."""
        self._questions_asked += 1
        return self._questions_asked

    def write(self, kind: str) -> bool:
        """The next output: True if it has to be written, False if it is in the log.

        Raises:
            Mismatch: an earlier attempt wrote something else in its place.
        """
        place, self._written = self._written, self._written + 1
        if place >= len(self._outputs):
            return True
        recorded = self._outputs[place]
        if recorded != kind:
            raise Mismatch(f"output {place + 1} of the turn was {recorded} in an earlier attempt and is {kind} now")
        return False

    def finish(self) -> None:
        """The attempt is done: everything that is recorded must have been asked for.

        Raises:
            Mismatch: something was not.
        """
        if self._unused:
            name, number = min(self._unused)
            raise Mismatch(f"step {name} number {number} was recorded by an earlier attempt and is not run now")
        if self._questions:
            raise Mismatch(f"question {self._questions[0].ask_id} was asked by an earlier attempt and is not asked now")
        if self._written < len(self._outputs):
            raise Mismatch(f"an earlier attempt has written {len(self._outputs)} outputs, this one {self._written}")
