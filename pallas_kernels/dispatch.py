"""Which implementation of an operator runs, and what errors mean.

An implementation raises `NotImplementedError` when it cannot serve a call that is itself valid
(another one may), and `ValueError` or `TypeError` when the caller erred.
"""

from collections.abc import Callable, Mapping
from typing import Any


def dispatch[R](
    operator: str,
    implementations: Mapping[str, Callable[..., R]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> R:
    """Runs an operator through the named implementation, or through the first that can.

    Args:
      operator: the operator's public name, for messages.
      implementations: name to function, the preferred ones first.
      implementation: a name from `implementations`, which then never falls back to another; or
        None, which tries them in order and moves on only at a `NotImplementedError`.
      *args: handed to the implementation.
      **kwargs: handed to the implementation.

    Raises:
      ValueError: if the name is unknown.
      NotImplementedError: if the named implementation cannot serve this call.
      ExceptionGroup: of `NotImplementedError`s, if None was given and no implementation can.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{operator}: {implementation=} is unknown; give None or one of "
                f"{list(implementations)}"
            )
        return implementations[implementation](*args, **kwargs)
    refusals = []
    for name, function in implementations.items():
        try:
            return function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusal.add_note(f"while trying {operator} with implementation={name!r}")
            refusals.append(refusal)
    raise ExceptionGroup(f"{operator}: no implementation serves this call", refusals)
