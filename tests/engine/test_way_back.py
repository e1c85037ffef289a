"""Back to pre-copy, on a virtual clock: a link that is lost at one moment, for so long."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from migrate.destination import DestinationRun
from migrate.errors import GuestOn
from migrate.handover import DestinationHandover
from migrate.lab.virtual import VirtualNetwork
from migrate.outbound import Outbound
from migrate.report.report import Report
from migrate.report.summary import summary_lines
from migrate.source import SourceRun
from migrate.timeouts import Timeouts
from proto.link.messages import EndOfState
from proto.link.session import LinkSession
from proto.link.state import LinkState
from tests.engine.test_simulated_guest_ends import PLAIN, migrate

PATIENT = replace(PLAIN, timeouts=Timeouts(reconnect_s=30, stopped_s=1))

When = Callable[[LinkSession], bool]


def lose_link(when: When, outage_s: float = 6) -> tuple[Report, Report]:
    """Migrate, and lose the link without a word once this is so at the source."""
    lost = False

    async def lose(source: SourceRun, _: DestinationRun, network: VirtualNetwork) -> None:
        nonlocal lost
        while source._link is None or not when(source._link.session):  # noqa: ASYNC110
            await trio.sleep(0.00001)
        lost = True
        network.cut()
        await trio.sleep(outage_s)
        network.is_down = False

    source, destination, _ = migrate(lose, PATIENT)
    assert lost
    return source, destination


def end_is_under_way(session: LinkSession) -> bool:
    return session.end_may_be_lost


def end_was_received(session: LinkSession) -> bool:
    return session.state is LinkState.STATE_COMPLETE and not session.end_may_be_lost


def test_a_guest_whose_end_was_lost_arrives_all_the_same() -> None:
    source, destination = lose_link(end_is_under_way)
    assert (source.error, destination.error) == (None, None)
    assert source.guest_on is GuestOn.DESTINATION
    assert source.back_to_precopy == destination.back_to_precopy == 1
    assert source.downtime_ms is not None
    stood_ms = source.downtime_ms + source.back_to_precopy_stopped_ms
    assert source.guest_clock_jump_ms == stood_ms
    assert destination.guest_clock_jump_ms == pytest.approx(stood_ms, abs=50)


def test_a_guest_whose_end_is_known_to_have_arrived_is_not_turned_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end comes alone, and so is acknowledged at once; long before VERIFIED."""
    judge, verify = Outbound._judge_rings, DestinationHandover._verify

    async def judge_slowly(self: Outbound) -> None:
        await trio.sleep(0.1)
        await judge(self)

    async def verify_slowly(self: DestinationHandover, end: EndOfState) -> bytes:
        await trio.sleep(0.1)
        return await verify(self, end)

    monkeypatch.setattr(Outbound, "_judge_rings", judge_slowly)
    monkeypatch.setattr(DestinationHandover, "_verify", verify_slowly)
    source, _ = lose_link(end_was_received)
    assert source.error is not None
    assert (source.error.code, source.guest_on) == ("peer-lost", GuestOn.SOURCE)
    assert (source.back_to_precopy, source.back_to_precopy_stopped_ms) == (0, 0)


def test_a_guest_that_went_on_and_found_no_link_has_stood_still() -> None:
    source, _ = lose_link(end_is_under_way, outage_s=60)
    assert source.error is not None
    assert (source.error.code, source.guest_on) == ("peer-lost", GuestOn.SOURCE)
    assert (source.back_to_precopy, source.downtime_ms) == (0, None)
    assert source.back_to_precopy_stopped_ms >= 1000
    assert source.guest_stopped
    (line,) = (line for line in summary_lines(source) if line.startswith("  downtime"))
    assert "s at the source, without a link" in line
