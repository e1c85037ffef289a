"""The judge of the matrix sees a guest that runs twice."""

from tests.crash.run_log import RunLog


def log(*entries: tuple[str, str, int]) -> RunLog:
    found = RunLog()
    for side, state, at in entries:
        (found.runs if state == "runs" else found.stands)(side, at)
    return found


def test_a_guest_that_moves_is_in_order() -> None:
    moved = log(("source", "runs", 0), ("source", "stands", 10), ("destination", "runs", 11))
    assert moved.wrongs() == []
    assert moved.ran("destination")
    assert moved.is_running("destination")
    assert not moved.is_running("source")


def test_a_guest_that_runs_on_both_sides_is_seen_however_it_came_to_that() -> None:
    both = "ran on both sides at once"
    assert both in log(("source", "runs", 0), ("destination", "runs", 5)).wrongs()
    assert both in log(("destination", "runs", 5), ("source", "runs", 7)).wrongs()
    late = log(("source", "runs", 0), ("destination", "runs", 5), ("source", "stands", 6))
    assert late.wrongs() == [both]


def test_a_guest_that_goes_on_from_its_past_needs_a_persons_word() -> None:
    back = log(
        ("source", "runs", 0),
        ("source", "stands", 10),
        ("destination", "runs", 11),
        ("destination", "stands", 12),
        ("source", "runs", 13),
    )
    past = "went on at the source from before it ran at the destination"
    assert back.wrongs() == [past]
    assert back.wrongs(fenced=True) == []
