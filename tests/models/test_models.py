"""Every model comes out as its runs say."""

from __future__ import annotations

import pytest

from models.catalogue import MODELS, select
from models.explore import Run, explore


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "run", [pytest.param(run, id=name, marks=[pytest.mark.slow] if run.slow else []) for name, run in select()]
)
def test_run_comes_out_as_it_must(run: Run) -> None:
    assert run.judge(explore(run.make())) is None


@pytest.mark.parametrize("name", MODELS)
def test_model_has_a_quick_clean_run_and_quick_counterexamples(name: str) -> None:
    quick = [run for run in MODELS[name] if not run.slow]
    assert any(run.breaks is None for run in quick)
    assert any(run.breaks is not None for run in quick)


def test_names_of_runs_are_unique() -> None:
    names = [f"{model}/{run.name}" for model, runs in MODELS.items() for run in runs]
    assert len(names) == len(set(names))


def test_every_removed_guard_says_how_long_its_counterexample_is() -> None:
    assert [name for name, run in select() if (run.breaks is None) != (run.length == 0)] == []
