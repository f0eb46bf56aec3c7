"""Plans which beginnings of texts are read once for several texts.

The texts are put in lexicographic order, so that those with a common beginning are neighbours. A
common beginning is a node of a tree: its tokens follow those of its parent, and the state after
them is kept in a slot until the last text that begins so has been read. The texts are divided into
groups of neighbours: the nodes that a group adds are read together, level by level.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from goose_jax.generation.validation import Ids

START = 0
"""The slot of the state that all texts begin with."""

_LEAST_LENGTH, _LEAST_SAVED = 8, 64
"""A beginning becomes a node if it adds at least so many tokens to its parent, and saves reading so
many tokens again. (Reading a node takes time of its own.)"""

_LEAVES_PER_ROW = 16
"""A group has at most this many texts for each row of a batch: memory for their tokens."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A beginning that several texts share.

    Attributes:
      text: index of one of these texts.
      begin: number of tokens that the parent has read.
      end: number of tokens that have been read after this node.
      parent: index of the parent, or None.
      level: number of ancestors.
      last: place, in the order of the plan, of the last text that begins so.
    """

    text: int
    begin: int
    end: int
    parent: int | None
    level: int
    last: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """Tokens of a text to be read after the state in a slot.

    Attributes:
      text: index of the text.
      begin: index of the first of these tokens.
      end: index after the last of these tokens.
      source: slot of the state before them.
      target: slot for the state after them; None for the rest of a text, whose state is not kept.
    """

    text: int
    begin: int
    end: int
    source: int
    target: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Neighbouring texts that are worked on together.

    Attributes:
      levels: what is to be read for the nodes that this group adds, the parents first. A level has
        at most as many as a batch has rows, and does not depend on itself or later levels.
      rests: for each text of the group what is left of it.
    """

    levels: list[list[Reading]]
    rests: list[Reading]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How texts are read.

    Attributes:
      groups: groups of texts, to be worked on in this order.
      num_slots: number of slots for states, `START` included.
    """

    groups: list[Group]
    num_slots: int


def plan_prefixes(texts: Sequence[Ids], batch_size: int) -> Plan:
    """Plans how texts are read, so that few tokens are read twice.

    Args:
      texts: token ids of each text. The nodes together cover at most all of a text.
      batch_size: maximum number of nodes of one level in a group.
    """
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">u4").tobytes())
    nodes, parents = _build_tree([texts[i] for i in order])
    free: list[int] = []
    num_slots = START + 1
    slots: dict[int | None, int] = {None: START}  # of the nodes whose states are kept
    groups = []
    for members in _divide(nodes, parents, batch_size):
        new = [node for node in _ancestors_of(members, nodes, parents) if node not in slots]
        for node in new:
            if not free:
                free.append(num_slots)
                num_slots += 1
            slots[node] = free.pop()
        by_level = itertools.groupby(
            sorted(new, key=lambda n: nodes[n].level), lambda n: nodes[n].level
        )
        levels = [
            [_reading(nodes[n], order, slots, slots[n]) for n in level] for _, level in by_level
        ]
        rests = [_rest(order[i], texts[order[i]], parents[i], nodes, slots) for i in members]
        groups.append(Group(levels, rests))
        done = [n for n in slots if n is not None and nodes[n].last <= members[-1]]
        free.extend(slots.pop(node) for node in done)
    return Plan(groups, num_slots)


def _reading(node: Node, order: Sequence[int], slots: dict[int | None, int], slot: int) -> Reading:
    return Reading(order[node.text], node.begin, node.end, slots[node.parent], slot)


def _rest(
    index: int,
    text: Ids,
    parent: int | None,
    nodes: Sequence[Node],
    slots: dict[int | None, int],
) -> Reading:
    begin = 0 if parent is None else nodes[parent].end
    return Reading(index, begin, len(text), slots[parent])


def _build_tree(texts: Sequence[Ids]) -> tuple[list[Node], list[int | None]]:
    """Returns the nodes, and for each text the index of its last node.

    Args:
      texts: texts in lexicographic order. `Node.text` and `Node.last` are places in it.
    """
    shared = np.array([_common_length(*pair) for pair in itertools.pairwise(texts)], int)
    nodes: list[Node] = []
    parents: list[int | None] = [None] * len(texts)
    todo: list[tuple[int, int, int | None]] = [(0, len(texts), None)] if texts else []
    while todo:
        first, end, parent = todo.pop()
        if end - first == 1:
            parents[first] = parent
            continue
        length = int(shared[first : end - 1].min())  # that all these texts share
        begin, level = (0, 0) if parent is None else (nodes[parent].end, nodes[parent].level + 1)
        added = length - begin
        if added >= _LEAST_LENGTH and added * (end - first - 1) >= _LEAST_SAVED:
            nodes.append(Node(first, begin, length, parent, level, end - 1))
            parent = len(nodes) - 1
        # No two parts share more than `length` tokens.
        cuts = first + 1 + np.flatnonzero(shared[first : end - 1] == length)
        edges = [first, *cuts.tolist(), end]
        todo += [(a, b, parent) for a, b in itertools.pairwise(edges)]
    return nodes, parents


def _common_length(a: Ids, b: Ids) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length


def _divide(
    nodes: Sequence[Node], parents: Sequence[int | None], batch_size: int
) -> Iterator[range]:
    """Yields ranges of texts whose nodes fit in one batch at each level."""
    first = 0
    met: set[int] = set()
    sizes: dict[int, int] = {}
    for place in range(len(parents)):
        new = [node for node in _chain(parents[place], nodes) if node not in met]
        is_full = any(sizes.get(nodes[n].level, 0) == batch_size for n in new)
        if is_full or place - first == _LEAVES_PER_ROW * batch_size:
            yield range(first, place)
            first, sizes = place, {}
        met.update(new)
        for node in new:
            sizes[nodes[node].level] = sizes.get(nodes[node].level, 0) + 1
    if first < len(parents):
        yield range(first, len(parents))


def _ancestors_of(
    members: range, nodes: Sequence[Node], parents: Sequence[int | None]
) -> list[int]:
    return list(dict.fromkeys(n for place in members for n in _chain(parents[place], nodes)))


def _chain(node: int | None, nodes: Sequence[Node]) -> Iterator[int]:
    """Yields a node and its ancestors."""
    while node is not None:
        yield node
        node = nodes[node].parent


__all__ = ["START", "Group", "Plan", "Reading", "plan_prefixes"]
