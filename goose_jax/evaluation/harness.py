"""The adapter for EleutherAI's lm-evaluation-harness (the package `lm_eval`, extra "lm-eval").

Importing this module registers the model "goose-jax" with the harness. So does

    python -m goose_jax.evaluation run --model goose-jax --model_args pretrained=rwkv7.pth ...

which is the harness's own command.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from goose_jax.checkpoints import load_model_and_tokenizer
from goose_jax.evaluation.prefix_states import PrefixStates
from goose_jax.evaluation.scoring import Score, score_continuations
from goose_jax.generation import ContinuousBatch, SamplingConfig
from goose_jax.generation.validation import check_seed
from goose_jax.nn import RWKV7, prepare_decoding
from goose_jax.state import RWKV7State
from goose_jax.text import TextStop, TextStream, Tokenizer, encode_continuation
from goose_jax.training import starting_state
from pallas_kernels.validation import check_positive

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("the evaluation harness needs: pip install 'goose-jax[lm-eval]'") from error

_AUTO_BATCH_SIZE = 32
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p")


@register_model("goose-jax")
class GooseLM(LM):
    """An RWKV-7 model as the evaluation harness calls it.

    Requests are worked on in batches, and what several contexts begin with is read once. Nothing is
    cut off: contexts, continuations and whole texts may have any length.

    Args:
      pretrained: a checkpoint that `load_pretrained` accepts; or a model.
      tokenizer: with a checkpoint, a name or path that `get_tokenizer` accepts, or None for the
        checkpoint's own; with a model, a tokenizer.
      dtype: with a checkpoint, the dtype of the parameters and of the computation (see
        `load_pretrained`).
      state: the state that each text begins with. With a checkpoint, a path that
        `goose-jax generate --state` accepts; with a model, a state of one row. None takes a trained
        initial state beside the checkpoint's weights, or else zeros.
      batch_size: maximum number of requests that are worked on at once. "auto" takes
        `max_batch_size`, or 32.
      max_batch_size: see `batch_size`.
      max_gen_toks: maximum number of new tokens of a request that sets none.
      add_bos_token: whether each context begins with the token that ends documents. An empty
        context always does.
      seed: seed of requests that sample.
      device: has no effect: the harness's command gives "cuda:0" if its user gives nothing. JAX
        chooses the device, for example by the variable `JAX_PLATFORMS`.

    Raises:
      ImportError: when this module is imported without the package `lm_eval`.
      OSError: if a file cannot be read.
      TypeError: if a model comes without a tokenizer.
      ValueError: if an argument is out of range, or the checkpoint is damaged.

    Example:
      >>> lm_eval.simple_evaluate(
      ...     model=GooseLM("rwkv7-g1.pth", dtype="bfloat16"), tasks=["lambada_openai"]
      ... )
    """

    def __init__(
        self,
        pretrained: Path | str | RWKV7,
        *,
        tokenizer: Path | str | Tokenizer | None = None,
        dtype: DTypeLike | None = None,
        state: Path | str | RWKV7State | None = None,
        batch_size: int | str = _AUTO_BATCH_SIZE,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        seed: int = 0,
        device: str | None = None,
    ):
        super().__init__()
        del device
        if batch_size == "auto":
            batch_size = _AUTO_BATCH_SIZE if max_batch_size is None else max_batch_size
        # On its command line the harness gives the number as a text.
        number: Any = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_positive("batch_size", number)
        check_positive("max_gen_toks", max_gen_toks)
        self._batch_size: int = number
        self._max_gen_toks = max_gen_toks
        self._seed = check_seed(seed)
        if isinstance(pretrained, RWKV7):
            model = pretrained
            self._tokenizer, self._state = _check_parts(tokenizer, dtype, state)
        else:
            model, self._tokenizer, self._state = _open(pretrained, tokenizer, dtype, state)
        self._weights = prepare_decoding(model)
        self._begins_with_end = add_bos_token
        if add_bos_token:
            self._begin_document()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of continuations, and whether each is what greedy would give.

        Args:
          requests: instances whose `args` are a context and a continuation.
          disable_tqdm: whether to show no progress.

        Returns:
          For each request the log-probability of the continuation in nats, and whether each of its
          tokens is the most probable one.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        scores = self._score(pairs, "log-likelihoods", disable_tqdm)
        results = [(score.log_likelihood, score.is_greedy) for score in scores]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of whole texts, after the token that ends documents.

        A text is read as one, however long it is, and not in windows.

        Args:
          requests: instances whose `args` are a text.
          disable_tqdm: whether to show no progress.
        """
        pairs = [(self._begin_document(), self._encode(*request.args)) for request in requests]
        scores = self._score(pairs, "log-likelihoods of whole texts", disable_tqdm)
        results = [score.log_likelihood for score in scores]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop text, the end of the document or a maximum length.

        Args:
          requests: instances whose `args` are a context and settings: `until` (a text or texts that
            end the continuation), `max_gen_toks`, `do_sample`, `temperature` (0, which is greedy,
            if it is not given), and `top_k` and `top_p`, which filter the probabilities at this
            temperature.
          disable_tqdm: whether to show no progress.

        Returns:
          The texts that follow the contexts, each without the stop text.

        Raises:
          ValueError: for other settings.
        """
        settings = [self._generation_settings(request.args[1]) for request in requests]
        prompts = [self._begin(self._encode(request.args[0])) for request in requests]
        end = self._tokenizer.end_of_document
        texts = [""] * len(requests)
        batch = ContinuousBatch(self._weights, num_slots=self._batch_size)
        prefixes = PrefixStates(
            self._weights,
            [np.array(prompt[:-1], np.int32) for prompt in prompts],
            batch_size=self._batch_size,
            state=self._state,
        )
        with tqdm(total=len(requests), desc="generated texts", disable=disable_tqdm) as progress:
            for rests in prefixes.groups():
                states = {rest.source: prefixes.states([rest]) for rest in rests}
                running = {}
                for rest in rests:
                    prompt, (until, limit, sampling) = prompts[rest.text], settings[rest.text]
                    request = batch.submit(
                        prompt[rest.begin :],
                        max_new_tokens=limit,
                        sampling=sampling,
                        stop_tokens=[] if end is None else [end],
                        seed=(self._seed + rest.text) % 2**32,
                        state=states[rest.source],
                    )
                    stream = TextStream(self._tokenizer, prompt, TextStop(until))
                    running[request] = (rest.text, stream)
                for index, text in _run(batch, running):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update()
        return texts

    def _generation_settings(
        self, given: Mapping[str, Any]
    ) -> tuple[list[str], int, SamplingConfig]:
        """Returns the stop texts, the maximum number of new tokens, and how tokens are drawn."""
        known = ("until", "do_sample", "num_beams", *_LIMITS, *_SAMPLING)
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"generation settings {', '.join(unknown)} are unknown, not {known}")
        if given.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={given['num_beams']} must be 1: there is no beam search")
        until = given.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limits = [int(given[name]) for name in _LIMITS if given.get(name) is not None]
        values = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
        if not values.get("temperature") or given.get("do_sample") is False:
            values = {"temperature": 0.0}
        # Tasks mean the order of filters of `transformers`.
        sampling = SamplingConfig(**values, temperature_first=True)
        return stops, limits[0] if limits else self._max_gen_toks, sampling

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], name: str, disable_tqdm: bool
    ) -> list[Score]:
        with tqdm(total=len(pairs), desc=name, disable=disable_tqdm) as progress:
            return score_continuations(
                self._weights,
                pairs,
                batch_size=self._batch_size,
                state=self._state,
                on_scored=progress.update,
            )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of a context and of what follows it.

        Both are encoded as one text, as models read them. Spaces at the end of the context go to
        the continuation, as in the harness, because tokens begin with spaces. If a token reaches
        over the border, the two are encoded one by one.
        """
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        tokens = self._encode(context)
        whole = self._encode(context + continuation)
        if whole[: len(tokens)] == tokens:
            return self._begin(tokens), whole[len(tokens) :]
        return self._begin(tokens), encode_continuation(self._tokenizer, continuation)

    def _begin(self, tokens: list[int]) -> list[int]:
        if tokens and not self._begins_with_end:
            return tokens
        return self._begin_document() + tokens

    def _begin_document(self) -> list[int]:
        """Returns the token before a document."""
        end = self._tokenizer.end_of_document
        if end is None:
            raise ValueError(
                "this tokenizer has no token that ends documents, which texts without a context "
                "begin with"
            )
        return [end]

    @property
    def _encode(self) -> Callable[[str], list[int]]:
        return self._tokenizer.encode


def _open(
    checkpoint: Path | str,
    tokenizer: Path | str | Tokenizer | None,
    dtype: DTypeLike | None,
    state: Path | str | RWKV7State | None,
) -> tuple[RWKV7, Tokenizer, RWKV7State | None]:
    """Loads a model, its tokenizer, and the state that its texts begin with."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        raise TypeError(f"{tokenizer=} must be a name or path if `pretrained` is a checkpoint")
    if isinstance(state, RWKV7State):
        raise TypeError("state must be a path if `pretrained` is a checkpoint")
    name = None if tokenizer is None else str(tokenizer)
    model, found = load_model_and_tokenizer(checkpoint, tokenizer=name, dtype=dtype)
    return model, found, starting_state(checkpoint, state, model)


def _check_parts(
    tokenizer: Path | str | Tokenizer | None,
    dtype: DTypeLike | None,
    state: Path | str | RWKV7State | None,
) -> tuple[Tokenizer, RWKV7State | None]:
    """Checks what comes with a model that is no checkpoint."""
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        raise TypeError(f"{tokenizer=} must be a tokenizer if `pretrained` is a model")
    if dtype is not None:
        raise ValueError(f"{dtype=} must be None if `pretrained` is a model")
    if isinstance(state, (str, Path)):
        raise TypeError(f"{state=} must be a state if `pretrained` is a model")
    return tokenizer, state


def _run(
    batch: ContinuousBatch, running: Mapping[int, tuple[int, TextStream]]
) -> Iterator[tuple[int, str]]:
    """Runs requests to their end.

    Args:
      batch: the batch with the requests.
      running: for each request its index and the stream of its text.

    Yields:
      The index and the text of each request, when it has ended.
    """
    texts = dict.fromkeys(running, "")
    while batch.unfinished:
        for update in batch.step():
            index, stream = running[update.request]
            texts[update.request] += stream.push(update.tokens)
            if update.finish_reason is not None:
                is_complete = update.finish_reason == "stop"
                yield index, texts.pop(update.request) + stream.finish(complete=is_complete)
            elif stream.stopped:
                batch.cancel(update.request)


__all__ = ["GooseLM"]
