"""Conversations as text to train on, in the form that `goose_jax.chat.prompt` describes."""

from collections.abc import Mapping, Sequence
from typing import Any

from goose_jax.chat.prompt import clean
from goose_jax.chat.tools import tool_output

_SPEAKERS = {
    "system": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "model": "Assistant",
    "bot": "Assistant",
    "tool": "Tool",
    "function": "Tool",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")


def render_conversation(messages: Sequence[Any]) -> tuple[str, tuple[tuple[int, int], ...]]:
    r"""Returns the text of a conversation, and which part of it the loss counts.

    Only what the assistant says is counted: each reply from the space after `Assistant:` on, with
    the text that ends it in a chat, such as `\n\nUser:`. The end of a document ends the last reply.

    Args:
      messages: objects with a "role" and a "content", or with "from" and "value". The roles are
        system, user (human), assistant (gpt, model, bot) and tool (function). What a tool returns
        becomes a message of the user, in the official form. A content is a text, or a list of
        `{"type": "text", "text": ...}`.

    Returns:
      text: the conversation. Line ends are LF. Messages have no space around them, and those of
        the system and the user no blank lines. Empty messages of the system are left out.
      counted: ranges of characters, in ascending order.

    Raises:
      ValueError: if a message has another form (the error names it), or there is no reply of the
        assistant.

    Example:
      >>> text, counted = render_conversation(
      ...     [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
      ... )
      >>> text, [text[start:end] for start, end in counted]
      ('User: 2 + 2?\n\nAssistant: 4', [' 4'])
    """
    turns = [_turn(f"messages[{i}]", message) for i, message in enumerate(messages)]
    turns = [(speaker, content) for speaker, content in turns if content]
    if not any(speaker == "Assistant" for speaker, _ in turns):
        raise ValueError("messages must hold a reply of the assistant")
    text, counted, begin = "", [], None
    for speaker, content in turns:
        text += ("\n\n" if text else "") + f"{speaker}:"
        if begin is not None:
            # Another reply does not end by its own name.
            end = len(text) - (len("Assistant:") if speaker == "Assistant" else 0)
            counted.append((begin, end))
        begin = len(text) if speaker == "Assistant" else None
        text += f" {content}"
    if begin is not None:
        counted.append((begin, len(text)))
    return text, tuple(counted)


def _turn(name: str, message: Any) -> tuple[str, str]:
    """Returns who speaks, and what; nothing for an empty message of the system."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be an object, got {_short(message)}")
    role = _value(name, message, _ROLE_KEYS)
    speaker = _SPEAKERS.get(role) if isinstance(role, str) else None
    if speaker is None:
        raise ValueError(
            f"{name}: the role must be one of {', '.join(_SPEAKERS)}, got {_short(role)}"
        )
    if message.get("tool_calls"):
        raise ValueError(f"{name}: tool_calls are not read; write the call into the content")
    content = _text(name, _value(name, message, _CONTENT_KEYS))
    if speaker == "Assistant":
        content = content.replace("\r\n", "\n").replace("\r", "\n").strip()
    elif speaker == "Tool":
        speaker, content = "User", clean(tool_output(content))
    else:
        content = clean(content)
    if not content and speaker != "System":
        raise ValueError(f"{name}: the message of the {role} is empty")
    return speaker, content


def _value(name: str, message: Mapping[str, Any], keys: tuple[str, str]) -> Any:
    present = [key for key in keys if message.get(key) is not None]
    if len(present) != 1:
        raise ValueError(f"{name} must have a {keys[0]!r} (or {keys[1]!r}), got {_short(message)}")
    return message[present[0]]


def _text(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts: list[str] = []
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(text, str) and part.get("type") == "text":
                texts.append(text)
        if len(texts) == len(content):
            return "".join(texts)
    raise ValueError(f"{name}: the content must be text, got {_short(content)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


__all__ = ["render_conversation"]
