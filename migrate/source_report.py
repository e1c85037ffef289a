"""Source: what happened becomes the report."""

from migrate.checkpoint.source_side import SourceCopies
from migrate.errors import GuestOn, MigrationError
from migrate.guests.base import GuestProgress
from migrate.handover import SourceHandover
from migrate.link_report import shown_phase, tell_link
from migrate.outbound import Outbound
from migrate.report.progress import ProgressState
from migrate.report.report import Integrity, Report
from migrate.session import Session
from migrate.transport.link import Link


def source_report(
    session: Session,
    link: Link | None,
    outbound: Outbound | None,
    handover: SourceHandover | None,
    error: MigrationError | None,
    *,
    copies: SourceCopies,
    downtime_limit_ms: int,
) -> Report:
    """Fill the report from whatever the run reached."""
    builder = session.builder
    if link is not None:
        if outbound is not None:
            outbound.sender.settle_ledger()
        else:
            session.ledger.add_bytes("control", link.sent_bytes)
        session.ledger.close(link.sent_bytes, session.runtime.now_ns())
        builder.report.wire_bytes_back = link.received_bytes
        tell_link(session, link, builder.report)
    if outbound is not None:
        _add_rounds(session, outbound)
        builder.report.ram_bytes = outbound.state.ram_bytes
        went_on = builder.report.back_to_precopy_stopped_ms > 0
        builder.report.guest_stopped = went_on or _was_stopped(outbound)
        builder.report.opaque_rest = outbound.state.opaque_rest or None
        if (verdict := outbound.rings.verdict) is not None:
            builder.report.devices = verdict.reports()
            builder.report.not_checked += verdict.not_checked()
    builder.take_ledger(session.ledger)
    if outbound is not None and handover is not None:
        builder.report.integrity = _integrity(outbound, handover)
        if handover.times.running_ns is not None:
            _add_downtime(session, outbound, handover)
            _warn_of_downtime(session, downtime_limit_ms)
    copies.tell(builder.report)
    now_ns = session.runtime.now_ns() - copies.publishing_ns
    if error is not None:
        return builder.failed(now_ns, error, None)
    assert handover is not None
    if outbound is not None and (classifier := outbound.state.classifier) is not None:
        table = classifier.table
        builder.report.never_sent_pages = table.page_count - table.touched_pages()
    if handover.running is None:
        return builder.completed(now_ns, GuestOn.HANDED_OVER, None)
    return builder.completed(now_ns, GuestOn.DESTINATION, handover.running.run_state)


def _was_stopped(outbound: Outbound) -> bool:
    state = outbound.state
    return state.switchover_at_ns is not None and state.run_state in {None, "running"}


def _add_rounds(session: Session, outbound: Outbound) -> None:
    for counts in session.ledger.rounds:
        notes = outbound.sender.round_notes.get(counts.round_no)
        session.builder.end_round(
            counts.round_no,
            (counts.ended_ns or counts.started_ns) - counts.started_ns,
            pages=counts.pages,
            wire_bytes=counts.wire_bytes,
            goodput_bps=notes.goodput_bps if notes else None,
            codec=notes.codec if notes else None,
            dirty_pages_per_s=notes.dirty_pages_per_s if notes else None,
            throttle_percent=notes.throttle_percent if notes else 0,
        )


def _integrity(outbound: Outbound, handover: SourceHandover) -> Integrity:
    classifier = outbound.state.classifier
    if classifier is None or handover.destination_digest is None:
        return Integrity()
    mine = classifier.table.digest()
    return Integrity(
        pages=classifier.table.page_count,
        source_digest=mine.hex(),
        destination_digest=handover.destination_digest.hex(),
        equal=handover.equal,
    )


def _warn_of_downtime(session: Session, limit_ms: int) -> None:
    downtime_ms = session.builder.report.downtime_ms
    if downtime_ms is not None and downtime_ms > limit_ms:
        session.builder.warn(
            f"the guest stood still for {downtime_ms:.0f} ms, the limit was {limit_ms} ms"
        )


def _add_downtime(session: Session, outbound: Outbound, handover: SourceHandover) -> None:
    """Break the downtime down by the moments at which each part ended."""
    times, state = handover.times, outbound.state
    stopped_ns = handover.guest.stopped_at_ns or state.switchover_at_ns
    if stopped_ns is None or state.run_state != "running" or times.running_ns is None:
        return
    builder = session.builder
    builder.downtime_part("last_pages", stopped_ns)
    sender = outbound.sender
    if sender.device_state_ns is not None:
        builder.downtime_part("device_state", sender.device_state_ns)
    if sender.ended_ns is not None:
        builder.downtime_part("verify", sender.ended_ns)
    if times.verified_ns is not None:
        builder.downtime_part("load", times.verified_ns)
    builder.downtime_part("commit", times.ready_ns or times.verified_ns or times.running_ns)
    builder.guest_runs(times.running_ns)
    report = builder.report
    if report.source == "simulate" and report.downtime_ms is not None:
        # kvm-clock stands still exactly as long as the guest does.
        stood_ms = report.downtime_ms + report.back_to_precopy_stopped_ms
        report.guest_clock_jump_ms = stood_ms


def progress_state(
    session: Session,
    link: Link | None,
    outbound: Outbound | None,
    known: GuestProgress,
    *,
    downtime_limit_ms: int,
) -> ProgressState:
    """What a person may see of a migration that is under way; ``known`` is the guest's part."""
    assert outbound is not None
    estimate = outbound.sender.consumed_estimate()
    stopped = outbound.state.switchover_at_ns is not None
    remaining = 0 if stopped else known.remaining_bytes
    return ProgressState(
        phase=shown_phase(
            link, "stop-and-copy" if stopped and session.phase == "precopy" else session.phase
        ),
        elapsed_ms=session.elapsed_ms,
        round_no=outbound.state.round_no,
        ram_bytes=outbound.state.ram_bytes or None,
        pages=session.ledger.pages,
        wire_bytes=link.sent_bytes if link else 0,
        goodput_bps=estimate.wire_bps if estimate else None,
        remaining_bytes=remaining,
        dirty_pages_per_s=known.dirty_pages_per_s,
        expected_downtime_ms=outbound.sender.expected_downtime_ms(remaining),
        downtime_limit_ms=downtime_limit_ms,
        codec=outbound.sender.codec_text,
    )
