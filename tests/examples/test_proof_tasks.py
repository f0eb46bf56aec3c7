"""The tasks of the proofs, compared with their definitions, which are computed in another way."""

import dataclasses
import itertools

import numpy as np
import pytest

from examples.proofs.tasks import (
    HELD_OUT,
    AssociativeRecall,
    DigitReversal,
    Passkey,
    PermutationProducts,
)

TASKS = (
    DigitReversal(4, 40, max_digits=9),
    PermutationProducts(4, 6, degree=3),
    AssociativeRecall(4, 32, examples=((16, 2), (32, 8)), vocab_size=64),
    Passkey(4, 20, digits=3),
)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_batches_are_a_function_of_seed_and_step(task):
    batch, again, later = task(5), task(5), task(6)
    assert batch.inputs.shape == batch.targets.shape == (4, task.sequence_length)
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    np.testing.assert_array_equal(batch.inputs, again.inputs)
    np.testing.assert_array_equal(batch.targets, again.targets)
    assert (batch.inputs != later.inputs).any()
    assert (batch.inputs != dataclasses.replace(task, seed=HELD_OUT)(5).inputs).any()
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < task.vocab_size
    assert batch.targets.max() < task.vocab_size


def test_numbers_are_followed_by_their_digits_in_reverse():
    task = DigitReversal(200, 128, max_digits=60)
    rows, lengths = task.rows(0)
    np.testing.assert_array_equal(task(0).inputs, rows[:, :-1])
    np.testing.assert_array_equal(task(0).targets, rows[:, 1:])
    first_lengths = []
    for row, marked in zip(rows, lengths, strict=True):
        text = "".join("0123456789,#"[token] for token in row)
        expected = []
        for piece in text.split("#"):
            number, comma, backwards = piece.partition(",")
            assert number == "0" or not number.startswith("0")
            assert number[::-1].startswith(backwards)
            expected += [0] * len(number + comma) + [len(number)] * len(backwards) + [0]
        assert marked.tolist() == expected[:-1]
        # Only the last number is cut off.
        assert all(len(p.split(",")[0]) == len(p.split(",")[1]) for p in text.split("#")[:-1])
        first_lengths.append(len(text.split("#")[0].split(",")[0]))
    counts = np.bincount(first_lengths, minlength=61)
    assert counts[0] == 0
    assert abs(np.mean(first_lengths) - 30.5) < 4  # 3.3 standard errors
    assert 0.07 < np.mean(rows[(lengths == 0) & (rows < 10)] == 7) < 0.13


@pytest.mark.parametrize(("degree", "factors"), [(3, "all"), (5, "all"), (5, "swaps")])
def test_products_of_permutations_are_those_of_their_matrices(degree, factors):
    task = PermutationProducts(64, 12, degree=degree, factors=factors)
    matrices = []
    for permutation in itertools.permutations(range(degree)):
        matrix = np.zeros((degree, degree), int)
        for i, image in enumerate(permutation):
            matrix[image, i] = 1
        matrices.append(matrix)
    assert task.vocab_size == len(matrices)
    batch = task(3)
    for tokens, targets in zip(batch.inputs, batch.targets, strict=True):
        product = np.eye(degree, dtype=int)
        for token, target in zip(tokens, targets, strict=True):
            product = product @ matrices[token]
            np.testing.assert_array_equal(product, matrices[target])
    used = {round(degree - np.trace(matrices[token])) for token in np.unique(batch.inputs)}
    assert used == ({0, 2} if factors == "swaps" else {0, *range(2, degree + 1)})  # moved elements
    assert len(np.unique(batch.inputs)) == {3: 6, 5: 11 if factors == "swaps" else 120}[degree]


def test_the_answers_of_associative_recall_are_found_by_search():
    task = AssociativeRecall(50, 64, examples=((32, 4), (64, 4), (64, 16)), vocab_size=256)
    kinds, gaps = set(), []
    for step in range(12):
        batch = task(step)
        (ids,) = {tuple(row) for row in batch.segment_ids.tolist()}
        size = ids.count(1)
        assert ids == tuple(1 + place // size for place in range(64))
        examples = (x.reshape(-1, size).tolist() for x in (batch.inputs, batch.targets))
        for tokens, targets in zip(*examples, strict=True):
            queries = [place for place, target in enumerate(targets) if target >= 0]
            pairs = len(queries)
            kinds.add((size, pairs))
            keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
            assert sorted(tokens[place] for place in queries) == sorted(set(keys))
            assert len(set(values)) == pairs
            assert all(
                0 < key < 128 <= value < 256 for key, value in zip(keys, values, strict=True)
            )
            for place in queries:
                assert place >= 2 * pairs
                assert place % 2 == 0
                assert targets[place] == tokens[tokens.index(tokens[place]) + 1]
            if (size, pairs) == (64, 4):
                gaps += [place - 2 * pairs for place in queries]
    assert kinds == set(task.examples)
    # The power law: the first of 28 places has a query in most rows, the last one rarely.
    share = np.bincount(np.array(gaps) // 2, minlength=28) / (len(gaps) / 4)
    assert share[0] > 0.6
    assert share[-5:].mean() < 0.1


def test_kinds_of_examples_join_one_after_another():
    task = AssociativeRecall(1, 16, ((8, 1), (8, 2), (16, 4)), curriculum=30, vocab_size=64)
    kinds = [(b.segment_ids.max(), (b.targets >= 0).sum()) for b in map(task, range(90))]
    first, second, third = (2, 2), (2, 4), (1, 4)
    assert set(kinds[:10]) == {first}
    assert set(kinds[10:20]) == {first, second}
    assert set(kinds[20:30]) == set(kinds[30:]) == {first, second, third}


@pytest.mark.parametrize("example", [(24, 4), (1, 1), (16, 5), (16, 0)])
def test_examples_that_do_not_fit(example):
    tokens, pairs = example
    with pytest.raises(ValueError, match=rf"sequence_length=64,.* got {tokens=}, {pairs=}"):
        AssociativeRecall(4, 64, ((64, 4), example))


def test_passkeys_are_in_their_texts():
    task = Passkey(100, 40, digits=4)
    batch = task(0)
    begins = set()
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        begin = tokens.index(task.KEY)
        begins.add(begin)
        key = tokens[begin + 1 : begin + 5]
        assert all(digit < 10 for digit in key)
        assert tokens.index(task.QUERY) == 36
        assert targets == [-1] * 36 + key
        assert tokens[37:] == key[:-1]
        noise = tokens[:begin] + tokens[begin + 5 : 36]
        assert min(noise) >= 12
    assert min(begins) == 0
    assert max(begins) == 31  # right before the query
