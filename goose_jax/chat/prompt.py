"""The text form of a conversation, on which the official chat models (G1) were trained.

    System: Be brief.

    User: What is 2 + 2?

    Assistant: 4

    User: Why?

    Assistant:

A blank line ends a turn, so a turn must not contain one. The prompt ends without a space, because
the first token of the reply begins with one.
"""

import re

STOPS = ("\n\nUser:", "\n\nSystem:")
"""Texts that end a reply: with them the model begins the turn of somebody else."""

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def clean(message: str) -> str:
    """Returns a message with LF as line ends, and without blank lines and surrounding space."""
    lines = message.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANK_LINES.sub("\n", lines).strip()


def next_turn(read: str, message: str, *, system: str = "", think: bool = False) -> str:
    """Returns the text that comes between the conversation so far and the next reply.

    Args:
      read: the conversation so far, as the model has read it; empty at the beginning.
      message: message of the user.
      system: instructions for the assistant. They are used only if `read` is empty.
      think: whether the model thinks before it answers. Its reply then continues `<think`.

    Returns:
      The text that the model reads next. It begins with the line ends that `read` lacks for a blank
      line.
    """
    if read:
        opening = _blank_line_after(read)
    else:
        opening = f"System: {clean(system)}\n\n" if clean(system) else ""
    return f"{opening}User: {clean(message)}\n\nAssistant:{think_prefix(think)}"


def think_prefix(think: bool) -> str:
    """Returns the text that a reply begins with. The model itself writes the closing `>`."""
    return " <think" if think else ""


def _blank_line_after(text: str) -> str:
    if text.endswith("\n\n"):
        return ""
    return "\n" if text.endswith("\n") else "\n\n"


__all__ = ["STOPS", "clean", "next_turn", "think_prefix"]
