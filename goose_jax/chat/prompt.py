"""The text form of a conversation, on which the official chat models (G1) were trained.

    System: Be brief.

    User: What is 2 + 2?

    Assistant: 4

    User: Why?

    Assistant:

A blank line ends a turn, so a turn must not contain one. The prompt ends without a space, because
the first token of the reply begins with one.

Source: `RWKV-v7/RWKV7-G1x-templates.txt` in https://github.com/BlinkDL/RWKV-LM (July 2026), which
lists the templates that these models were trained with.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from goose_jax.chat.tools import CALL_PREFIX, tools_text

type Thinking = Literal["none", "fast", "closed", "on", "short", "medium", "long"]
"""How a model thinks before it answers; `THINKING` describes the modes."""

THINKING: dict[Thinking, tuple[str, str]] = {
    "none": ("", ""),
    "fast": ("", " <think></think"),
    "closed": ("", " <think>\n</think"),
    "on": ("", " <think"),
    "short": (" (think a bit)", " <think"),
    "medium": (" (think)", " <think"),
    "long": (" (think a lot)", " <think"),
}
"""For each mode the end of the user's message, and the text that the reply begins with.

The model itself writes the closing `>`. "fast" and "closed" let it answer after thoughts that are
empty.
"""

STOPS = ("\n\nUser:", "\nUser:", "\n\nSystem:")
"""Texts that end a reply: with them the model begins the turn of somebody else."""

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_THOUGHTS = re.compile(r"\s*<think>(.*?)(?:</think>|\Z)(.*)", re.DOTALL)


def check_thinking(think: Any) -> None:
    """Raises a ValueError if a value is not one of the modes of thinking."""
    if think not in get_args(Thinking.__value__):
        raise ValueError(f"think must be one of {', '.join(THINKING)}, got {think!r}")


def clean(message: str) -> str:
    """Returns a message with LF as line ends, and without blank lines and surrounding space."""
    lines = message.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANK_LINES.sub("\n", lines).strip()


def next_turn(
    read: str,
    message: str,
    *,
    system: str = "",
    think: Thinking = "none",
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns the text that comes between the conversation so far and the next reply.

    Args:
      read: the conversation so far, as the model has read it; empty at the beginning.
      message: message of the user.
      system: instructions for the assistant. They are used only if `read` is empty.
      think: how the model thinks before it answers.
      tools: functions that the model may call, as `tools_text` describes them. Their descriptions
        follow the instructions; the reply is begun as a call if `think` is "none".

    Returns:
      The text that the model reads next. It begins with the line ends that `read` lacks for a blank
      line, and ends with the text that the reply begins with.
    """
    instructions = clean("\n".join([system, tools_text(tools) if tools else ""]))
    if read:
        opening = _blank_line_after(read)
    else:
        opening = f"System: {instructions}\n\n" if instructions else ""
    begun = reply_prefix(think, calls=bool(tools))
    return f"{opening}User: {clean(message)}{THINKING[think][0]}\n\nAssistant:{begun}"


def reply_prefix(think: Thinking, *, calls: bool = False) -> str:
    """Returns the text that a reply begins with, which the model reads and does not write.

    Args:
      think: how the model thinks before it answers.
      calls: whether the model may call functions.
    """
    return CALL_PREFIX if calls and think == "none" else THINKING[think][1]


def split_thinking(reply: str) -> tuple[str, str]:
    """Divides a reply, from the text that it begins with, into its thoughts and its answer.

    Both are without surrounding space. Thoughts that have not ended have no answer.
    """
    match = _THOUGHTS.fullmatch(reply)
    return (match[1].strip(), match[2].strip()) if match else ("", reply.strip())


def _blank_line_after(text: str) -> str:
    if text.endswith("\n\n"):
        return ""
    return "\n" if text.endswith("\n") else "\n\n"


__all__ = [
    "STOPS",
    "THINKING",
    "Thinking",
    "check_thinking",
    "clean",
    "next_turn",
    "reply_prefix",
    "split_thinking",
]
