"""A conversation with a model, remembered as its recurrent state."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from goose_jax.chat.prompt import STOPS, next_turn
from goose_jax.generation import SamplingConfig, generate, prefill
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State
from goose_jax.text import StreamingDecoder, TextStop, Tokenizer
from pallas_kernels.validation import check_positive

type Ending = Literal["end", "length", "interrupted"]

_BLOCK_SIZE = 4  # tokens between two looks at the keyboard
_SEEDS = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplySettings:
    """How replies are written.

    Attributes:
      system: what the assistant shall be like; a conversation begins with it.
      think: let the model think before it answers; for models that were trained to.
      max_new_tokens: the most tokens of a reply.
      temperature: 0 always takes the most probable token; higher is more varied.
      top_k: draw from this many of the most probable tokens only; 0 is off.
      top_p: draw from the most probable tokens that together have this probability; 1 is off.
      presence_penalty: subtracted from the logits of tokens that are in the reply already.
      frequency_penalty: subtracted from the logits as often as the token is in the reply.
      penalty_decay: by this factor each token makes the ones before it count less.
      stop: more texts that end a reply; they are not part of it.
      seed: the same seed gives the same replies to the same messages.
    """

    system: str = ""
    think: bool = False
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.3
    presence_penalty: float = 0.5
    frequency_penalty: float = 0.5
    penalty_decay: float = 0.996
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ValueError: naming the one that is out of range.
        """
        check_positive("max_new_tokens", self.max_new_tokens)
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed must lie in 0..2**32-1, got {self.seed}")
        TextStop(self.stop)
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """The part of it that says how tokens are drawn."""
        fields = dataclasses.fields(SamplingConfig)
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields if f.init})


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What has been said.

    Attributes:
      text: all of it, in the form of `goose_jax.chat.prompt`.
      state: of the model after reading exactly that text, one row; before it begins, None or what
        it begins with.
    """

    text: str = ""
    state: RWKV7State | None = None


class ChatSession:
    """Turns of a user and a model; each turn reads only what is new.

    Args:
      model: which writes the replies.
      tokenizer: of the model.
      settings: may be set anew between turns.
      start: the state that conversations begin with; None is the start of any text.

    Attributes:
      conversation: so far; may be set, as to one that was saved.
      settings: of the next reply.
    """

    def __init__(
        self,
        model: RWKV7,
        tokenizer: Tokenizer,
        settings: ReplySettings,
        start: RWKV7State | None = None,
    ):
        self.settings = settings
        self._model = model
        self._tokenizer = tokenizer
        self._replies = 0
        self._start = start
        self.reset()

    def reset(self) -> None:
        """Forgets what has been said."""
        self.conversation = Conversation(state=self._start)

    @property
    def conversation(self) -> Conversation:
        """What has been said so far."""
        return self._conversation

    @conversation.setter
    def conversation(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._last_turn: tuple[Conversation, str] | None = None

    def reply(
        self, message: str, write: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Ending:
        """Reads a message and writes the reply.

        If this raises an error, the conversation is what it was before.

        Args:
          message: of the user.
          write: gets the text of the reply as it comes.
          stopped: asked every few tokens; if it says True, the reply ends there.

        Returns:
          Why it ended: the model or a stop text ended it, it had `max_new_tokens`, or `stopped`.

        Raises:
          ValueError: if the tokenizer cannot express the message.
        """
        before, settings = self._conversation, self.settings
        turn = next_turn(before.text, message, system=settings.system, think=settings.think)
        tokens = self._tokenizer.encode(turn)
        writer = _ReplyWriter(self._tokenizer, tokens, (*STOPS, *settings.stop), write)
        end = self._tokenizer.end_of_document
        result = generate(
            self._model,
            [tokens],
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling(),
            stop_tokens=[] if end is None else [end],
            seed=(settings.seed + self._replies) % _SEEDS,
            state=before.state,
            on_tokens=lambda new: writer.push(new[0].tolist()) or stopped(),
            block_size=_BLOCK_SIZE,
        )
        interrupted = stopped()
        writer.finish(complete=not interrupted)
        state = result.state
        if writer.stopped or interrupted:
            # That state has read more than the reply. The message and the reply are read again, in
            # parallel, from where the state was before them.
            kept = self._tokenizer.encode(writer.text) if writer.text else []
            state = prefill(self._model, [tokens + kept], state=before.state)
        self.conversation = Conversation(before.text + turn + writer.text, state)
        self._last_turn = (before, message)
        self._replies += 1
        if interrupted:
            return "interrupted"
        at_limit = result.lengths[0] == settings.max_new_tokens and not writer.stopped
        return "length" if at_limit else "end"

    def regenerate(self, write: Callable[[str], None], stopped: Callable[[], bool]) -> Ending:
        """Writes another reply to the last message, with the next random numbers.

        Raises:
          ValueError: if nothing has been said in this session.
        """
        if self._last_turn is None:
            raise ValueError("there is no message to reply to again")
        after, last_turn = self._conversation, self._last_turn
        try:
            self.conversation = last_turn[0]
            return self.reply(last_turn[1], write, stopped)
        except BaseException:
            self._conversation, self._last_turn = after, last_turn
            raise


class _ReplyWriter:
    """Writes tokens as text until a stop text comes.

    Attributes:
      text: all that was written.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stops: tuple[str, ...],
        write: Callable[[str], None],
    ):
        self.text = ""
        self._write_text = write
        self._decoder = StreamingDecoder(tokenizer)
        self._decoder.push(prompt)
        self._ending = TextStop(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._ending.reached

    def push(self, tokens: list[int]) -> bool:
        """Writes what is complete, and tells whether a stop text has come."""
        self._write(self._ending.push(self._decoder.push(tokens)))
        return self.stopped

    def finish(self, *, complete: bool) -> None:
        """Writes what was held back; of a reply that was cut, without half a character."""
        tail = self._ending.push(self._decoder.finish()) if complete else ""
        self._write(tail + self._ending.finish())

    def _write(self, text: str) -> None:
        self.text += text
        self._write_text(text)


__all__ = ["ChatSession", "Conversation", "Ending", "ReplySettings"]
