"""The text of a conversation, as the official chat models (G1) were trained on it.

    System: Be brief.

    User: What is 2 + 2?

    Assistant: 4

    User: Why?

    Assistant:

A blank line ends a turn, so none may be within one. The prompt ends without a space, because the
model's first token brings its own.
"""

import re

STOPS = ("\n\nUser:", "\n\nSystem:")
"""Texts that end a reply: the model has begun to write somebody else's turn."""

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def clean(message: str) -> str:
    """A message as a turn holds it: LF ends lines, and no blank lines, there or at its ends."""
    lines = message.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANK_LINES.sub("\n", lines).strip()


def next_turn(read: str, message: str, *, system: str = "", think: bool = False) -> str:
    """The text that continues a conversation, up to where the model writes.

    Args:
      read: all of the conversation so far, as the model has read it; empty at its beginning.
      message: of the user.
      system: what the assistant shall be like; only the beginning of a conversation can say it.
      think: let the model think first: its reply continues `<think`.

    Returns:
      What is to be read next; it begins with as many line ends as `read` lacks for a blank line.
    """
    if read:
        opening = _blank_line_after(read)
    else:
        opening = f"System: {clean(system)}\n\n" if clean(system) else ""
    return f"{opening}User: {clean(message)}\n\nAssistant:{think_prefix(think)}"


def think_prefix(think: bool) -> str:
    """What a reply begins with before the model writes. (The tokens of `>` are the model's.)"""
    return " <think" if think else ""


def _blank_line_after(text: str) -> str:
    if text.endswith("\n\n"):
        return ""
    return "\n" if text.endswith("\n") else "\n\n"


__all__ = ["STOPS", "clean", "next_turn", "think_prefix"]
