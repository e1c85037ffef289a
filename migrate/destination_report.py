"""Destination: what happened becomes the report."""

from migrate.errors import GuestOn, MigrationError
from migrate.handover import DestinationHandover
from migrate.inbound import Inbound
from migrate.link_report import shown_phase, tell_link
from migrate.report.progress import ProgressState
from migrate.report.report import DeviceReport, Integrity, Report
from migrate.ring_guard import arrived_reports
from migrate.session import Session
from migrate.transport.link import Link
from proto.link.messages import CommitKind


def destination_report(
    session: Session,
    link: Link | None,
    inbound: Inbound | None,
    handover: DestinationHandover | None,
    error: MigrationError | None,
) -> Report:
    """Fill the report from whatever the run reached."""
    report = session.builder.report
    if inbound is not None:
        blocks = inbound.state.blocks
        report.ram_bytes = sum(b.used_length for b in blocks.blocks) if blocks else 0
        report.opaque_rest = inbound.state.opaque_rest or None
        report.integrity = _integrity(inbound)
    if link is not None:
        received = link.received_bytes
        if link.cuts.count:  # what came and was dropped with its epoch came again
            session.ledger.add_bytes("resent", max(0, received - link.session.taken_bytes))
        session.ledger.add_bytes("control", max(0, received - session.ledger.wire_bytes))
        report.wire_bytes_back = link.sent_bytes
        tell_link(session, link, report)
        report.back_to_precopy = link.session.turns
    session.builder.take_ledger(session.ledger)
    now_ns = session.runtime.now_ns()
    if error is not None:
        run_state = handover.run_state if handover else None
        return session.builder.failed(now_ns, error, run_state)
    assert handover is not None
    report.devices = _devices(handover)
    relayed = handover.kind is CommitKind.RELAYED
    guest_on = GuestOn.HANDED_OVER if relayed else GuestOn.DESTINATION
    return session.builder.completed(now_ns, guest_on, handover.run_state)


def _integrity(inbound: Inbound) -> Integrity:
    applier, end = inbound.state.applier, inbound.state.end
    if applier is None or end is None:
        return Integrity()
    mine = applier.table.digest()
    return Integrity(
        pages=applier.table.page_count,
        source_digest=end.ram_digest.hex(),
        destination_digest=mine.hex(),
        equal=(mine, inbound.opaque_digest) == (end.ram_digest, end.opaque_digest),
    )


def _devices(handover: DestinationHandover) -> list[DeviceReport]:
    if handover.rings is not None:
        return handover.rings.reports()
    state = handover.inbound.state
    checked = state.end is not None and state.end.rings_checked
    return arrived_reports(handover.guest, state.device_state, checked_by_source=checked)


def progress_state(
    session: Session, link: Link | None, inbound: Inbound | None
) -> ProgressState:
    """What a person may see of a migration that is under way."""
    assert link is not None
    assert inbound is not None
    stopped = inbound.state.stopped and session.phase == "precopy"
    blocks = inbound.state.blocks
    return ProgressState(
        phase=shown_phase(link, "stop-and-copy" if stopped else session.phase),
        elapsed_ms=session.elapsed_ms,
        round_no=inbound.state.round_no,
        ram_bytes=sum(b.used_length for b in blocks.blocks) if blocks else None,
        pages=session.ledger.pages,
        wire_bytes=link.received_bytes,
        receiving=True,
    )
