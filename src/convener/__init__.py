"""convener: long-lived conversations between people and AI agents, on a cluster of Python servers."""

from __future__ import annotations

from convener.app import Convener
from convener.errors import ConvenerError
from convener.gateway.auth import Identity
from convener.manager import (
    AgentLoopInfo,
    ClusteredConversationManager,
    ConversationManager,
    StandaloneConversationManager,
)
from convener.manager.turn import Conversation, Turn
from convener.settings import Settings
from convener.version import __version__

__all__ = [
    "AgentLoopInfo",
    "ClusteredConversationManager",
    "Convener",
    "Conversation",
    "ConversationManager",
    "ConvenerError",
    "Identity",
    "Settings",
    "StandaloneConversationManager",
    "Turn",
    "__version__",
]
