"""All models by name, and their runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from models import archive, asking, burial, failover, ownership, rollback, slots, stop, wake
from models.explore import Run

MODELS: Final[Mapping[str, Sequence[Run]]] = {
    "ownership": ownership.RUNS,
    "slots": slots.RUNS,
    "wake": wake.RUNS,
    "asking": asking.RUNS,
    "stop": stop.RUNS,
    "burial": burial.RUNS,
    "rollback": rollback.RUNS,
    "failover": failover.RUNS,
    "archive": archive.RUNS,
}


def select(names: Iterable[str] = (), *, slow: bool = True) -> list[tuple[str, Run]]:
    """The runs that `names` name, as (model/run, run), in order of the catalogue; all without names.

    Args:
        names: models, or runs as ``model/run``.
        slow: whether slow runs belong to it; one that is named in full always does.

    Raises:
        KeyError: there is no model or run of that name.
    """
    everything = {f"{model}/{run.name}": run for model, runs in MODELS.items() for run in runs}
    wanted = set(names)
    for name in wanted:
        if name not in MODELS and name not in everything:
            raise KeyError(name)
    return [
        (name, run)
        for name, run in everything.items()
        if name in wanted or ((not wanted or name.partition("/")[0] in wanted) and (slow or not run.slow))
    ]
