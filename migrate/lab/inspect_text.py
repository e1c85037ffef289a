"""``inspect``'s output for people: aligned tables, sizes with units."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from migrate.lab.inspect_model import PAGE_KINDS, KindCounts, Round, Survey
from migrate.lab.inspect_rings import Rings
from migrate.units import format_count, format_ms, format_rate, format_size
from proto.ring_check import QueueCheck
from proto.virtqueue import (
    EVENT_IDX_FEATURE,
    RING_PACKED_FEATURE,
    VERSION_1_FEATURE,
    VirtioDeviceState,
)

FIRST_ROUNDS: Final = 12
LAST_ROUNDS: Final = 8
"""Rounds shown of a stream with many; ``--all`` shows them all."""

STATUS_BITS: Final = {
    0x01: "acknowledge",
    0x02: "driver",
    0x08: "features-ok",
    0x04: "driver-ok",
    0x40: "needs-reset",
    0x80: "failed",
}

STATUS_READY: Final = 0x0F
MAX_UNUSED_QUEUES: Final = 4
"""A virtio-serial has 60 queues for ports that nobody plugged in."""

Row = Sequence[str]


def table(title: Row, rows: Iterable[Row | str], left: int = 1) -> Iterator[str]:
    """Align columns: the first ``left`` to the left, the others to the right.

    A row that is a string is a line of its own.
    """
    lines = [title, *rows]
    cells = [line for line in lines if not isinstance(line, str)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(title))]
    for line in lines:
        if isinstance(line, str):
            yield f"  {line}"
        else:
            aligned = (
                cell.ljust(width) if i < left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            yield f"  {'  '.join(aligned)}".rstrip()


def survey_lines(name: str, survey: Survey, rings: Rings, *, everything: bool) -> Iterator[str]:
    """Yield the whole output, line by line."""
    state = "complete" if survey.complete else "not complete"
    yield f"{name}: QEMU migration stream, {format_size(survey.stream_bytes)}, {state}"
    yield from _configuration(survey)
    yield from _blocks(survey)
    yield from _rounds(survey, everything=everything)
    yield from _commands(survey)
    yield from _sections(survey)
    yield from _devices(survey)
    yield from _virtqueues(rings, everything=everything)
    notes = list(survey.not_shown)
    if rings.not_checked and rings.devices:
        notes.append(f"check of the rings: {rings.not_checked}")
    yield from _list("Cannot be shown", notes)
    yield from _list("Problems", rings.problems)


def _list(title: str, texts: Sequence[str]) -> Iterator[str]:
    if texts:
        yield ""
        yield title
        yield from (f"  {text}" for text in texts)


def _configuration(survey: Survey) -> Iterator[str]:
    found = survey.configuration
    if found is None:
        return
    rows = [("machine type", found.machine), ("stream version", str(found.stream_version))]
    if found.capabilities:
        rows.append(("capabilities", " ".join(found.capabilities)))
    if found.uuid is not None:
        rows.append(("UUID", found.uuid))
    if found.target_page_bits is not None:
        rows.append(("page size", format_size(1 << found.target_page_bits)))
    if found.subsections:
        names = (name.removeprefix("configuration/") for name in found.subsections)
        rows.append(("subsections", " ".join(names)))
    if survey.run_state is not None:
        rows.append(("run state", survey.run_state))
    if survey.description_bytes is not None:
        rows.append(("description", f"{format_size(survey.description_bytes)} of JSON"))
    if survey.trailing_bytes:
        rows.append(("behind the end", f"{format_count(survey.trailing_bytes)} bytes"))
    yield ""
    yield "Configuration"
    yield from (f"  {key:16}{value}" for key, value in rows)


def _kinds(counts: Iterable[KindCounts]) -> list[str]:
    """Kinds of records that have a column: the usual two, the others if there are any."""
    seen = {kind for each in counts for kind, number in each.items() if number}
    return [kind for kind in PAGE_KINDS if kind in seen or kind in ("page", "zero")]


def _numbers(counts: KindCounts, kinds: Iterable[str]) -> list[str]:
    values = dict(counts.items())
    return [format_count(values[kind]) if values[kind] else "-" for kind in kinds]


def _blocks(survey: Survey) -> Iterator[str]:
    if not survey.blocks:
        return
    kinds = _kinds(block.records for block in survey.blocks)
    has_gpa = any(block.gpa is not None for block in survey.blocks)
    rows = [
        [
            block.name,
            format_size(block.size_bytes),
            *_numbers(block.records, kinds),
            *([f"{block.gpa or 0:#x}"] if has_gpa else []),
        ]
        for block in survey.blocks
    ]
    yield ""
    yield f"RAM: {format_size(survey.ram_bytes)} in {len(rows)} blocks; records of pages by kind"
    yield from table(["block", "size", *kinds, *(["address"] if has_gpa else [])], rows)


def _rounds(survey: Survey, *, everything: bool) -> Iterator[str]:
    rounds = survey.rounds
    if not rounds:
        return
    kinds = _kinds(this_round.pages for this_round in rounds)
    is_live = rounds[0].start_ms is not None
    title = ["round", "", "from byte", "to byte", "size", *kinds]
    rows: list[Row | str] = [_round_row(this_round, kinds) for this_round in rounds]
    total = ["all", "", "", "", format_size(sum(each.stream_bytes for each in rounds))]
    total += [*_numbers(survey.pages(), kinds), *(["", "", ""] if is_live else [])]
    hidden = len(rows) - FIRST_ROUNDS - LAST_ROUNDS
    if hidden > 1 and not everything:
        dots = f"…  ({format_count(hidden)} more: --all)"
        rows = [*rows[:FIRST_ROUNDS], dots, *rows[-LAST_ROUNDS:]]
    yield ""
    yield f"Rounds: {format_count(len(rounds))}"
    yield from table(
        [*title, *(["begins", "takes", "rate"] if is_live else [])], [*rows, total], 2
    )


def _round_row(this_round: Round, kinds: Iterable[str]) -> list[str]:
    label = "bulk" if this_round.n == 0 and this_round.phase == "precopy" else ""
    row = [
        str(this_round.n),
        label or this_round.phase.replace("precopy", ""),
        str(this_round.start_offset_bytes),
        str(this_round.end_offset_bytes),
        format_size(this_round.stream_bytes),
        *_numbers(this_round.pages, kinds),
    ]
    if this_round.start_ms is not None and this_round.end_ms is not None:
        took_ms = this_round.end_ms - this_round.start_ms
        row += [format_ms(this_round.start_ms), format_ms(took_ms)]
        row.append(format_rate(this_round.stream_bytes / took_ms * 1000) if took_ms else "-")
    return row


def _commands(survey: Survey) -> Iterator[str]:
    if survey.commands:
        rows: list[Row | str] = [
            [str(each.offset_bytes), each.name, each.value] for each in survey.commands
        ]
        hidden = len(rows) - FIRST_ROUNDS - LAST_ROUNDS
        if hidden > 1:
            dots = f"…  ({format_count(hidden)} more: --json)"
            rows = [*rows[:FIRST_ROUNDS], dots, *rows[-LAST_ROUNDS:]]
        yield ""
        yield f"Commands: {format_count(len(survey.commands))}"
        yield from table(["at byte", "command", "value"], rows, 3)


def _sections(survey: Survey) -> Iterator[str]:
    found = [section for section in survey.sections if section.kind == "iterable"]
    if found:
        rows = [
            [
                section.name,
                section.detail,
                str(section.section_id),
                str(section.instance),
                str(section.version),
                format_count(section.parts),
                str(section.offset_bytes),
                format_size(section.stream_bytes),
            ]
            for section in found
        ]
        title = ["name", "", "id", "instance", "version", "parts", "at byte", "size"]
        yield ""
        yield f"Iterable sections: {len(rows)}"
        yield from table(title, rows, 2)


def _devices(survey: Survey) -> Iterator[str]:
    found = survey.devices()
    if found:
        rows = [
            [
                section.name,
                str(section.section_id),
                str(section.instance),
                str(section.version),
                str(section.offset_bytes),
                format_count(section.body_bytes or 0),
            ]
            for section in found
        ]
        total = sum(section.stream_bytes for section in found)
        yield ""
        yield f"Devices: {len(rows)}, {format_size(total)}"
        title = ["name", "id", "instance", "version", "at byte", "bytes of state"]
        yield from table(title, rows)


def _virtqueues(rings: Rings, *, everything: bool) -> Iterator[str]:
    if not rings.devices:
        return
    title = ["queue", "size", "descriptors", "available", "used", "avail_idx", "last_avail_idx"]
    title += ["used_idx", "in flight", "ring"]
    rows: list[Row | str] = []
    for device in rings.devices:
        rows.append(_device_text(device))
        checks = rings.checks_of(device)
        unused = [check for check in checks if _is_unused(check)]
        hide = len(unused) > MAX_UNUSED_QUEUES and not everything
        rows += [_queue_row(check) for check in checks if not (hide and _is_unused(check))]
        if hide:
            rows.append(f"  …  ({len(unused)} more, never used: --all)")
    yield ""
    count = len(rings.checks)
    yield f"Virtqueues: {count} set up by the drivers of {len(rings.devices)} devices"
    yield from table(title, rows)


def _is_unused(check: QueueCheck) -> bool:
    """Whether nothing ever went through a queue, and nothing is wrong with it."""
    queue = check.state
    indices = (check.avail_idx, queue.last_avail_idx, queue.used_idx)
    return check.consistent is not False and not any(indices)


def _device_text(device: VirtioDeviceState) -> str:
    status = [name for bit, name in STATUS_BITS.items() if device.status & bit]
    last = "driver-ok" if device.status == STATUS_READY else " ".join(status) or "reset"
    words = [f"status {device.status:#04x} {last}"]
    if device.status:
        words.append(f"features {device.features:#x}")
        words.append("modern" if device.has_feature(VERSION_1_FEATURE) else "legacy")
    for bit, name in ((RING_PACKED_FEATURE, "packed"), (EVENT_IDX_FEATURE, "event-idx")):
        if device.has_feature(bit):
            words.append(name)
    if device.broken:
        words.append("BROKEN")
    if device.disabled:
        words.append("may not touch memory")
    waiting = [f"{count} in queue {index}" for index, count in device.in_flight]
    if waiting:
        words.append(f"requests kept: {' '.join(waiting)}")
    return f"{device.name}: {', '.join(words)}"


def _queue_row(check: QueueCheck) -> list[str]:
    queue = check.state
    ring = {True: "ok", False: "BAD", None: "not checked"}[check.consistent]
    return [
        f"  {queue.index}",
        str(queue.num),
        f"{queue.desc:#x}",
        f"{queue.avail:#x}",
        f"{queue.used:#x}",
        _optional(check.avail_idx),
        str(queue.last_avail_idx),
        _optional(queue.used_idx),
        _optional(queue.in_flight),
        ring,
    ]


def _optional(value: int | None) -> str:
    return "-" if value is None else str(value)
