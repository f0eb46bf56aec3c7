r"""Functions that a chat model may call, in the form on which the G1 models were trained.

    System: Tools:
    [
    {"name":"get_weather","arguments":{"city":{"type":"string"}}}
    ]
    Return only a JSON function call.

    User: How is the weather in Oslo?

    Assistant: ```json
    {"name":"get_weather","arguments":{"city":"Oslo"}}
    ```

    User: Function output:
    {"temperature":7}

    Assistant: ```json

Source: `RWKV-v7/RWKV7-G1x-templates.txt` in https://github.com/BlinkDL/RWKV-LM (July 2026).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CALL_PREFIX = " ```json"
"""The text that a reply begins with if it is to be a call."""

_OPENING = re.compile(r"```([\w+-]*)[ \t]*(?:\n\s*|\Z)")
_DECODER = json.JSONDecoder()
_CLOSING = re.compile(r"\s*(?:```|\Z)")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that a model has asked for.

    Attributes:
      name: name of the function.
      arguments: its arguments by name, as JSON gives them. They are not checked against the schema.
    """

    name: str
    arguments: dict[str, Any]


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the description of functions that follows the word `System:`.

    Args:
      tools: one description for each function. It has a "name", a "description" (may be missing),
        and either "parameters", a JSON schema of an object, or "arguments", the schema of each
        argument. `{"type": "function", "function": {...}}` is accepted for the description.

    Raises:
      ValueError: if a description has another form. The message names it.
    """
    lines = [_json(_described(f"tools[{i}]", tool)) for i, tool in enumerate(tools)]
    return "Tools:\n[\n" + ",\n".join(lines) + "\n]\nReturn only a JSON function call."


def tool_output(value: Any) -> str:
    """Returns the message by which a user gives a model the result of a call.

    Args:
      value: the result: anything that JSON can hold. A text is passed on as it is.

    Raises:
      ValueError: if JSON cannot hold the value.
    """
    return f"Function output:\n{value if isinstance(value, str) else _json(value)}"


def parse_tool_calls(answer: str) -> list[ToolCall]:
    """Returns the calls in the answer of a model; an answer without JSON has none.

    Args:
      answer: a reply with the text that it begins with, without thoughts. Calls are expected
        between ```json and ```, between ``` and ``` if a brace or bracket follows, or as the whole
        answer. There is one call or a list of calls. Blocks of other languages are passed over.

    Raises:
      ValueError: if such a block is not JSON, or is no call.
    """
    text = answer.strip()
    if text.startswith(("{", "[")):
        value, end = _decode(text, 0)
        values, rest = [value], text[end:]
        if rest.strip():
            raise ValueError(f"text follows the model's call: {_short(rest)}")
    else:
        values = list(_fenced(text))
    return [_call(item) for v in values for item in (v if isinstance(v, list) else [v])]


def _described(name: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must be an object with a name, got {_short(tool)}")
    schema = function.get("parameters", {})
    if not isinstance(schema, Mapping):
        raise ValueError(f"{name} must have an object as parameters, got {_short(schema)}")
    arguments = function.get("arguments", schema.get("properties", {}))
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{name} must have an object as arguments, got {_short(arguments)}")
    described = {key: function[key] for key in ("name", "description") if function.get(key)}
    described["arguments"] = dict(arguments)
    if schema.get("required"):
        described["required"] = schema["required"]
    return described


def _fenced(text: str) -> Iterator[Any]:
    """Yields the values of the blocks that hold JSON."""
    place = 0
    while opening := _OPENING.search(text, place):
        start = opening.end()
        if opening[1] == "json" or (not opening[1] and text.startswith(("{", "["), start)):
            value, end = _decode(text, start)
            yield value
            closing = _CLOSING.match(text, end)
            if closing is None:
                raise ValueError(f"text follows the model's call: {_short(text[end:])}")
            place = closing.end()
        else:
            closing_place = text.find("```", start)
            place = len(text) if closing_place < 0 else closing_place + 3


def _decode(text: str, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the model's call is not JSON: {error}: {_short(text)}") from error


def _call(value: Any) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"]:
        arguments = value.get("arguments", {})
        if isinstance(arguments, dict):
            return ToolCall(value["name"], arguments)
    raise ValueError(f"a call must have a name and an object of arguments, got {_short(value)}")


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"JSON cannot hold {_short(value)}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


__all__ = ["CALL_PREFIX", "ToolCall", "parse_tool_calls", "tool_output", "tools_text"]
