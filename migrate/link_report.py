"""What a link went through becomes a part of the report and of the progress display."""

import trio

from migrate.report.report import CutReport, Report
from migrate.session import Session
from migrate.transport.link import Link

COARSE_S = 10
"""From so many seconds on an outage is told in steps of as many: every change may be a line."""


def tell_link(session: Session, link: Link, report: Report) -> None:
    """Put connections and cuts into the report."""
    report.streams = link.most_streams
    report.reconnects = link.cuts.count
    report.outage_ms = link.cuts.outage_s * 1000
    now_s, now_ms = trio.current_time(), session.elapsed_ms
    report.cuts = [
        CutReport(
            at_ms=now_ms - (now_s - cut.began_s) * 1000,
            outage_ms=cut.outage_s * 1000,
            resent_bytes=cut.resent_bytes,
            cause=cut.cause,
        )
        for cut in link.cuts.listed
    ]


def shown_phase(link: Link | None, phase: str) -> str:
    """The phase in words, or that there is no link."""
    if link is None or link.outage is None:
        return phase
    down_s = int(trio.current_time() - link.outage.began_s)
    if down_s >= COARSE_S:
        down_s -= down_s % COARSE_S
    return f"{phase}: link lost, reconnecting ({down_s} s)"
