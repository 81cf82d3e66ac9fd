"""Managers: what runs conversations on a node, and what makes many nodes behave like one."""

from convener.manager.base import (
    AgentLoopInfo,
    ClientSink,
    ConversationHandle,
    ConversationManager,
    ListedConversation,
    SendResult,
)
from convener.manager.clustered import ClusteredConversationManager
from convener.manager.standalone import StandaloneConversationManager

__all__ = [
    "AgentLoopInfo",
    "ClientSink",
    "ClusteredConversationManager",
    "ConversationHandle",
    "ConversationManager",
    "ListedConversation",
    "SendResult",
    "StandaloneConversationManager",
]
