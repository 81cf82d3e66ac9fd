"""The public names, pinned: whoever adds or removes one changes this list and the change log."""

from __future__ import annotations

import subprocess
import sys

import pytest

import convener

PUBLIC = [
    "AgentLoopInfo",
    "ClusteredConversationManager",
    "Convener",
    "ConvenerError",
    "Conversation",
    "ConversationManager",
    "Identity",
    "Interrupted",
    "Loop",
    "Retry",
    "Settings",
    "StandaloneConversationManager",
    "StepFailed",
    "Turn",
    "__version__",
]


def test_public_names_are_these() -> None:
    assert convener.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(convener))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_can_be_imported(name: str) -> None:
    assert getattr(convener, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        getattr(convener, "nothing_of_ours")  # noqa: B009


def test_importing_the_package_loads_neither_web_framework_nor_store() -> None:
    code = "import convener, sys; print([m for m in ('fastapi', 'redis', 'socketio') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "[]"
