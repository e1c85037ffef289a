"""Both commands: record at the start of a migration what recovery would have to know."""

from migrate.guests.base import DestinationGuest, SourceGuest
from migrate.hello import Agreement
from migrate.params import LinkAddress
from migrate.state_file import RecordFacts, StateFile
from proto.link.messages import CommitKind


def begin_record(
    record: StateFile,
    agreement: Agreement,
    guest: SourceGuest | DestinationGuest,
    *,
    peer: str,
    link: LinkAddress,
    was_running: bool | None = None,
) -> None:
    """Record that a migration is under way; nothing if somebody else commits it.

    Args:
        record: Where.
        agreement: What both sides agreed on.
        guest: This side's.
        peer: The other command, for people.
        link: Where migrate-dst listens.
        was_running: Whether the guest ran before, where that is known by now.

    Raises:
        MigrationError: It cannot be recorded.
    """
    if agreement.kind is CommitKind.RELAYED:
        return
    record.begin(
        RecordFacts(
            migration_id=agreement.migration_id,
            kind=agreement.kind.value,
            form=guest.form,
            guest=guest.name,
            peer=peer,
            link=str(link),
            qmp=guest.place.qmp,
            process=guest.place.process,
            settings=guest.place.settings,
            run_state={True: "running", False: "paused", None: None}[was_running],
        )
    )
