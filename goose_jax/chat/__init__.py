"""Conversations with a model."""

from goose_jax.chat.presets import SAMPLING_PRESETS, SamplingPreset
from goose_jax.chat.prompt import Thinking, split_thinking
from goose_jax.chat.saved_chat import load_chat, save_chat
from goose_jax.chat.session import ChatSession, Conversation, Ending, ReplySettings
from goose_jax.chat.tools import ToolCall, parse_tool_calls, tool_output
from goose_jax.chat.training_text import render_conversation

__all__ = [
    "SAMPLING_PRESETS",
    "ChatSession",
    "Conversation",
    "Ending",
    "ReplySettings",
    "SamplingPreset",
    "Thinking",
    "ToolCall",
    "load_chat",
    "parse_tool_calls",
    "render_conversation",
    "save_chat",
    "split_thinking",
    "tool_output",
]
