"""Streams as ``migrate-lab inspect`` sees them, for its tests."""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from typing import Final

from hypothesis import strategies as st

from migrate.lab.inspect_json import survey_document
from migrate.lab.inspect_model import Block, Survey
from migrate.lab.inspect_pages import SpooledPages
from migrate.lab.inspect_ram import PageSink
from migrate.lab.inspect_rings import check_rings, decode_devices, memory_map
from migrate.lab.inspect_stream import StreamSurveyor
from migrate.lab.inspect_text import survey_lines
from tests import golden_streams
from tests.strategies import cuts, receive

positions: Final = st.lists(st.integers(0, 2**24), max_size=8)
load = cache(golden_streams.load)


def survey_of(
    data: bytes,
    at: Sequence[int] = (),
    sink_for: Callable[[list[Block]], PageSink] | None = None,
    *,
    live: bool = False,
) -> Survey:
    surveyor = StreamSurveyor(sink_for, live=live)
    for piece in cuts(data, at):
        rest = piece
        while rest:
            taken = receive(rest, surveyor.get_buffer, surveyor.buffer_updated)
            rest = rest[taken:]
    surveyor.feed_eof()
    return surveyor.survey


def always(sink: PageSink) -> Callable[[list[Block]], PageSink]:
    return lambda _: sink


def spooled(blocks: list[Block]) -> closing[SpooledPages]:
    return closing(SpooledPages(blocks, None))


def shown(survey: Survey) -> str:
    """The text and, for its side effects, the JSON document."""
    rings = decode_devices(survey)
    check_rings(rings, memory_map(survey), survey.blocks, None)
    survey_document(survey, rings, name="x", kind="file", is_packed=False)
    return "\n".join(survey_lines("x", survey, rings, everything=False))
