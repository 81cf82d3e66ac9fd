"""convener: long-lived conversations between people and AI agents, on a cluster of Python servers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from convener.version import __version__

if TYPE_CHECKING:
    from convener.app import Convener
    from convener.errors import ConvenerError
    from convener.gateway.auth import Identity
    from convener.manager import (
        AgentLoopInfo,
        ClusteredConversationManager,
        ConversationManager,
        StandaloneConversationManager,
    )
    from convener.manager.conversation import Conversation
    from convener.manager.loops import Loop
    from convener.manager.traits import Interrupted
    from convener.manager.turn import Retry, StepFailed, Turn
    from convener.settings import Settings

__all__ = [
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

# Loaded when they are asked for: a command that only talks HTTP need not load a web framework and a store first.
_HOMES: Final = {
    "AgentLoopInfo": "convener.manager",
    "ClusteredConversationManager": "convener.manager",
    "Convener": "convener.app",
    "ConvenerError": "convener.errors",
    "Conversation": "convener.manager.conversation",
    "ConversationManager": "convener.manager",
    "Identity": "convener.gateway.auth",
    "Interrupted": "convener.manager.traits",
    "Loop": "convener.manager.loops",
    "Retry": "convener.manager.turn",
    "Settings": "convener.settings",
    "StepFailed": "convener.manager.turn",
    "StandaloneConversationManager": "convener.manager",
    "Turn": "convener.manager.turn",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
