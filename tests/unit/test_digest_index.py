"""The digest index finds what is in it and nothing else, however digests meet."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from migrate.pages.digest_index import DigestIndex, first_of_equals
from migrate.pages.digests import Digests

# Few values, some of which begin with the same bits: they meet in the table.
halves = st.sampled_from([0, 1, 2, 1 << 52, (1 << 52) + 1, 1 << 63, (1 << 64) - 1])
digest_lists = st.lists(st.tuples(halves, halves), max_size=40)


def digests(rows: list[tuple[int, int]]) -> Digests:
    return np.array(rows, np.uint64).reshape(-1, 2)


def random_digests(count: int, seed: int = 1) -> Digests:
    return np.random.default_rng(seed).integers(0, 1 << 64, (count, 2), np.uint64)


@given(st.lists(digest_lists, max_size=4), digest_lists)
def test_the_first_of_equal_digests_is_found_as_in_a_dict(
    pieces: list[list[tuple[int, int]]], wanted: list[tuple[int, int]]
) -> None:
    index, model = DigestIndex(), dict[tuple[int, int], int]()
    for piece in pieces:
        index.append(digests(piece))
    everything = [row for piece in pieces for row in piece]
    for number, row in enumerate(everything):
        model.setdefault(row, number)
    found, numbers = index.find(digests(wanted))
    assert found.tolist() == [row in model for row in wanted]
    assert numbers.tolist() == [model.get(row, 0) for row in wanted]
    assert index.count == len(everything)
    assert index.digests.tolist() == [list(row) for row in everything]


def test_a_growing_index_keeps_what_it_had() -> None:
    everything = random_digests(30_000)
    index = DigestIndex()
    for start in range(0, len(everything), 7001):
        index.append(everything[start : start + 7001])
    found, numbers = index.find(everything)
    assert found.all()
    assert (numbers == np.arange(len(everything))).all()
    assert not index.find(random_digests(5000, seed=2))[0].any()


def test_digests_that_a_peer_made_to_meet_take_no_time() -> None:
    """All want the same place; those that do not get one are not found, and others are."""
    meeting = random_digests(20_000)
    meeting[:, 0] >>= np.uint64(40)
    index = DigestIndex()
    index.append(meeting)
    others = random_digests(1000, seed=3)
    index.append(others)
    assert 0 < index.find(meeting)[0].sum() < len(meeting)
    assert index.find(others)[0].mean() > 0.99


@given(digest_lists)
def test_first_of_equals(rows: list[tuple[int, int]]) -> None:
    expected = [row not in rows[:at] for at, row in enumerate(rows)]
    assert first_of_equals(digests(rows)).tolist() == expected
