"""Makes batches before they are asked for, in threads or processes of grain."""

import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from goose_jax.data.batches import Batch, BatchSource
from pallas_kernels.validation import check_positive

_ALL_STEPS = 2**40


class PrefetchedBatches:
    """A `BatchSource` that makes the batches of the next steps while others are trained on.

    The batches are those of the source, whatever is prefetched: a batch is a function of its step.
    So the step, which each checkpoint holds, is all that a resumed run needs to go on exactly. A
    call for another step than the next one begins anew from there.

    Args:
      batches: the source. For `workers` it must be picklable.
      ahead: number of batches that are made before they are asked for, in each worker.
      workers: number of processes that make batches; 0 makes them in threads of this process.
        Batches of mapped tokens hardly need processes.

    Raises:
      ValueError: if `ahead` is not a positive integer, or `workers` is below 0.

    Example:
      >>> with PrefetchedBatches(batches, workers=2) as prefetched:
      ...     batch = prefetched(0)
    """

    def __init__(self, batches: BatchSource, *, ahead: int = 4, workers: int = 0):
        check_positive("ahead", ahead)
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self._batches, self._ahead, self._workers = batches, ahead, workers
        self._iterator: Iterator[Batch] | None = None
        self._next = 0
        self._parts: list[Self] = []

    @property
    def source(self) -> str:
        """What messages call the data."""
        return self._batches.source

    @property
    def checksum(self) -> str:
        """Identifies the data."""
        return self._batches.checksum

    def for_process(self, index: int, count: int) -> Self:
        """Returns the same data for one of several processes, as `BatchSource` says.

        It is closed with this one.
        """
        batches = self._batches.for_process(index, count)
        part = type(self)(batches, ahead=self._ahead, workers=self._workers)
        self._parts.append(part)
        return part

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0.

        Raises:
          ValueError: if the source raises one.
          OSError: if a process that makes batches was killed.
        """
        if self._iterator is None or step != self._next:
            self.close()
            self._iterator = self._start(step)
        try:
            batch = next(self._iterator)
        except ValueError as error:  # its traceback is that of grain, or of another process
            raise ValueError(str(error)) from error
        except RuntimeError as error:
            raise OSError(f"a process that makes batches has ended: {error}") from error
        self._next = step + 1
        return batch

    def _start(self, step: int) -> Iterator[Batch]:
        import absl.flags
        import grain  # takes a second or two to import

        steps = grain.MapDataset.source(_Steps(self._batches, step))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead)
        dataset: Any = steps.to_iter_dataset(options)
        if self._workers:
            # grain asks flags of absl, which only programs of absl parse.
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._ahead),
                worker_init_fn=_end_with_parent,
            )
        return iter(dataset)

    def close(self) -> None:
        """Ends the threads and processes. Another call starts them again."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None
        for part in self._parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Steps:
    """The batches from a step on, as a sequence."""

    def __init__(self, batches: BatchSource, first: int):
        self._batches, self._first = batches, first

    def __len__(self) -> int:
        return _ALL_STEPS

    def __getitem__(self, index: Any) -> Batch:
        return self._batches(self._first + int(index))


def _end_with_parent(index: int, count: int) -> None:
    """Lets a worker end when the process that started it is gone, even if that was killed."""
    del index, count
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Waits until the process that started this one is gone, and ends this one then."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


__all__ = ["PrefetchedBatches", "exit_with_parent"]
