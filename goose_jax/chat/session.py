"""A conversation with a model, which the model remembers as its recurrent state."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from goose_jax.chat.presets import SAMPLING_PRESETS
from goose_jax.chat.prompt import STOPS, Thinking, check_thinking, next_turn, reply_prefix
from goose_jax.chat.tools import tools_text
from goose_jax.generation import SamplingConfig, generate, prefill
from goose_jax.generation.validation import SEEDS, check_max_new_tokens, check_seed
from goose_jax.nn import RWKV7, DecodingWeights, prepare_decoding
from goose_jax.state import RWKV7State
from goose_jax.text import TextStop, TextStream, Tokenizer, encode_continuation
from goose_jax.text.tokenizer import REPLACEMENT

type Ending = Literal["end", "length", "interrupted"]
"""Why a reply ended: by itself, at its greatest length, or by the user."""

_REPLACED = REPLACEMENT.decode()
"""Stands in texts for bytes that are not UTF-8, and for unknown ids."""

BLOCK_SIZE = 4
"""Number of tokens between two calls of `stopped`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplySettings:
    """How replies are written.

    Attributes:
      system: instructions for the assistant; only the beginning of a conversation can hold them.
      think: how the model thinks before it answers, for models that were trained to. none: not at
        all. fast, closed: its thoughts are empty, on one or two lines. on: it thinks. short,
        medium, long: it thinks a bit, as usual or a lot.
      max_new_tokens: maximum number of tokens in a reply.
      sampling: how tokens are drawn.
      stop: more texts that end a reply; they are not part of it.
      seed: the same seed gives the same replies to the same messages.

    Raises:
      ValueError: if a value is out of range. The message names it.
    """

    system: str = ""
    think: Thinking = "none"
    max_new_tokens: int = 1024
    sampling: SamplingConfig = SAMPLING_PRESETS["demo"]
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_thinking(self.think)
        check_max_new_tokens(self.max_new_tokens)
        check_seed(self.seed)
        TextStop(self.stop)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The text of a conversation, and the state of the model after reading it.

    Attributes:
      text: the whole text, in the form that `goose_jax.chat.prompt` describes.
      state: recurrent state of one row after exactly this text. While the text is empty, the state
        that the conversation starts from; None is the start of a text.
    """

    text: str = ""
    state: RWKV7State | None = None


class ChatSession:
    r"""Turns of a user and a model. Each turn reads only the new message.

    Args:
      model: the model that writes the replies, or `prepare_decoding(model)`. Its matrices are cast
        to the compute dtype here, once for all replies.
      tokenizer: tokenizer of the model.
      settings: settings of the replies.
      start: state of one row that conversations start from; None is the start of a text.
      tools: functions that the model may call, as `goose_jax.chat.tools.tools_text` takes them.

    Raises:
      ValueError: if `tools` have another form.

    Example:
      >>> config = RWKV7Config(vocab_size=257, hidden_size=64, num_layers=1)
      >>> model = RWKV7(config, rngs=nnx.Rngs(0))
      >>> session = ChatSession(model, ByteTokenizer(), ReplySettings(max_new_tokens=8))
      >>> pieces = []
      >>> session.reply("Hi", pieces.append, lambda: False)
      'length'
      >>> session.conversation.text == "User: Hi\n\nAssistant:" + "".join(pieces)
      True

    Attributes:
      settings: settings of the next reply; may be assigned.
      conversation: the conversation so far; may be assigned, to continue another one.
      tools: functions that the model may call; may be assigned. The beginning of a conversation
        describes them. Later only their presence counts: without thinking, a reply is begun as a
        call as long as there are any.
      last_reply: the last reply in this session, from the text that it begins with (`<think` or
        the beginning of a call). `goose_jax.chat.split_thinking` and `parse_tool_calls` read it.
    """

    def __init__(
        self,
        model: RWKV7 | DecodingWeights,
        tokenizer: Tokenizer,
        settings: ReplySettings,
        start: RWKV7State | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ):
        tools_text(tools)  # checks them
        self.settings = settings
        self.tools = tools
        self._weights = prepare_decoding(model)
        self._tokenizer = tokenizer
        self._unspellable = "" if _can_encode(tokenizer, _REPLACED) else _REPLACED
        self._replies = 0
        self._start = start
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.conversation = Conversation(state=self._start)

    @property
    def conversation(self) -> Conversation:
        """The conversation so far."""
        return self._conversation

    @conversation.setter
    def conversation(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._last_turn: tuple[Conversation, str] | None = None
        self.last_reply = ""

    def reply(
        self, message: str, write: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Ending:
        """Reads a message and writes a reply.

        If this method raises an error, the conversation does not change.

        Args:
          message: message of the user.
          write: called with each new piece of the reply.
          stopped: called every few tokens; the reply ends if it returns True.

        Returns:
          Why the reply ended. "end": the model or a stop text ended it. "length": it has
          `max_new_tokens`. "interrupted": `stopped` returned True.

        Raises:
          NonFiniteLogitsError: if the logits are NaN or infinite.
          ValueError: if the tokenizer cannot encode the message.
        """
        before, settings = self._conversation, self.settings
        turn = next_turn(
            before.text,
            message,
            system=settings.system,
            think=settings.think,
            tools=self.tools,
        )
        turn, tokens = self._encode_turn(turn, is_first=not before.text)
        stop = TextStop((*STOPS, *settings.stop))
        stream = TextStream(self._tokenizer, tokens, stop)
        writer = _ReplyWriter(stream, write, leave_out=self._unspellable)
        end = self._tokenizer.end_of_document
        result = generate(
            self._weights,
            [tokens],
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            stop_tokens=[] if end is None else [end],
            seed=(settings.seed + self._replies) % SEEDS,
            state=before.state,
            on_tokens=lambda new: writer.push(new[0].tolist()) or stopped(),
            block_size=BLOCK_SIZE,
        )
        interrupted = stopped()
        at_limit = result.lengths[0] == settings.max_new_tokens and not writer.stopped
        writer.finish(complete=not (interrupted or at_limit))
        state = result.state
        if not self._spell(result.sequences[0], writer.text):
            # Read the turn again, in parallel, from the state before it.
            kept = encode_continuation(self._tokenizer, writer.text)
            state = prefill(self._weights, [tokens + kept], state=before.state)
        self.conversation = Conversation(before.text + turn + writer.text, state)
        self._last_turn = (before, message)
        self.last_reply = reply_prefix(settings.think, calls=bool(self.tools)) + writer.text
        self._replies += 1
        if interrupted:
            return "interrupted"
        return "length" if at_limit else "end"

    def _encode_turn(self, turn: str, *, is_first: bool) -> tuple[str, list[int]]:
        """Returns the tokens of a turn, and its text as they spell it."""
        if is_first or not self._tokenizer.leading_space:
            return turn, self._tokenizer.encode(turn)
        tokens = encode_continuation(self._tokenizer, turn)
        return self._tokenizer.decode_bytes(tokens).decode(errors="replace"), tokens

    def _spell(self, tokens: list[int], text: str) -> bool:
        """Returns whether tokens are exactly this text.

        They are not if they go on after a stop text, if they end inside a character, if bytes are
        not UTF-8, or if the text hides a token: one that decodes to nothing, or an unknown id.
        """
        pieces = [self._tokenizer.decode_bytes([token]) for token in tokens]
        return b"".join(pieces) == text.encode() and not {b"", REPLACEMENT} & set(pieces)

    def regenerate(self, write: Callable[[str], None], stopped: Callable[[], bool]) -> Ending:
        """Replaces the last reply by another one, which is drawn with the next random numbers.

        Args:
          write: called with each new piece of the reply.
          stopped: called every few tokens; the reply ends if it returns True.

        Returns:
          Why the reply ended, as `reply` does.

        Raises:
          ValueError: if no message has been replied to in this session.
        """
        if self._last_turn is None:
            raise ValueError("there is no message to reply to again")
        after, last_turn, last_reply = self._conversation, self._last_turn, self.last_reply
        try:
            self.conversation = last_turn[0]
            return self.reply(last_turn[1], write, stopped)
        except BaseException:
            self._conversation, self._last_turn, self.last_reply = after, last_turn, last_reply
            raise


class _ReplyWriter:
    """Writes the text of a reply as its tokens come.

    Args:
      stream: makes text of the tokens.
      write: called with each piece of text.
      leave_out: a text that is not written, because the tokenizer cannot encode it; empty for none.

    Attributes:
      text: the text that has been written.
    """

    def __init__(self, stream: TextStream, write: Callable[[str], None], *, leave_out: str):
        self.text = ""
        self._leave_out = leave_out
        self._stream = stream
        self._write_text = write

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stream.stopped

    def push(self, tokens: list[int]) -> bool:
        """Writes the text that is complete, and returns whether a stop text has come."""
        self._write(self._stream.push(tokens))
        return self.stopped

    def finish(self, *, complete: bool) -> None:
        """Writes the text that was held back, as `TextStream.finish` returns it."""
        self._write(self._stream.finish(complete=complete))

    def _write(self, text: str) -> None:
        if self._leave_out:
            text = text.replace(self._leave_out, "")
        self.text += text
        self._write_text(text)


def _can_encode(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except ValueError:
        return False
    return True


__all__ = ["BLOCK_SIZE", "ChatSession", "Conversation", "Ending", "ReplySettings"]
