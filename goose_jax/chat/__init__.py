"""Conversations with a model."""

from goose_jax.chat.saved_chat import load_chat, save_chat
from goose_jax.chat.session import ChatSession, Conversation, Ending, ReplySettings

__all__ = [
    "ChatSession",
    "Conversation",
    "Ending",
    "ReplySettings",
    "load_chat",
    "save_chat",
]
