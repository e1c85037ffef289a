"""The report as text for a terminal: what one wants to know first stands first.

Pure: report in, lines out. The last line of either command is ``guest_line``.
"""

from collections.abc import Sequence
from typing import Final

from migrate.errors import GuestOn
from migrate.report.ledger import BYTE_KINDS, PAGE_CLASSES
from migrate.report.report import (
    DeviceCounts,
    Report,
    Role,
    RoundReport,
    Service,
    ServiceFigures,
    SimulatedDeviceReport,
)
from migrate.units import format_count, format_ms, format_rate, format_size

PART_NAMES: Final = {
    "last_pages_ms": "last pages",
    "device_state_ms": "device state",
    "load_ms": "load",
    "verify_ms": "verify",
    "commit_ms": "commit",
}
"""The parts of the downtime, in the order in which they are shown."""

ROUND_COLUMNS: Final = (
    "round",
    "duration",
    "pages",
    "on wire",
    "goodput",
    "dirtied/s",
    "codec",
    "throttled",
)
DEVICE_COLUMNS: Final = (
    "device",
    "requests",
    "exits",
    "saved",
    "per request",
    "before",
    "during",
    "after",
    "interrupts",
    "saved",
    "dropped",
)
"""Of simulated devices. ``before``, ``during`` and ``after`` are exits per request, too."""

_SHOWN_COLUMNS: Final = (0, 1, 2, 4, 8, 10)
"""What fits a terminal: device, requests, exits, exits per request, interrupts, dropped."""

_UNKNOWN: Final = "it is UNKNOWN where the guest runs"
_FIRST_ROUNDS: Final = 4
_LAST_ROUNDS: Final = 5
_LABEL_WIDTH: Final = 12


def summary_lines(report: Report) -> list[str]:
    """Describe a migration in a few dozen lines; the last one says where the guest is."""
    if report.command == "recover":
        return _recovery_lines(report)
    lines = [f"migration {report.status}"]
    if report.error is not None:
        lines.append(_labelled("error", f"{report.error.message} [{report.error.code}]"))
    lines += _headline(report)
    lines += _class_table(report)
    lines += _round_table(report.rounds)
    lines += _device_table(report.simulated_devices)
    lines += _checks(report)
    simulated = "simulate" in {report.source, report.destination}
    last = guest_line(
        report.guest_on,
        report.guest_state,
        simulated_role=report.role if simulated else None,
        recovery=report.recovery,
    )
    lines += ["", f"{last}, until this command ends" if _lives_in_us(report) else last]
    return lines


def _lives_in_us(report: Report) -> bool:
    """A simulated guest lives in the process of the side it is on."""
    form = {GuestOn.SOURCE: report.source, GuestOn.DESTINATION: report.destination}
    return report.guest_on.value == report.role and form.get(report.guest_on) == "simulate"


def _recovery_lines(report: Report) -> list[str]:
    lines = [f"recovery {report.status}"]
    if report.error is not None:
        lines.append(_labelled("error", f"{report.error.message} [{report.error.code}]"))
    lines += [_labelled("warning", text) for text in report.warnings]
    return [*lines, guest_line(report.guest_on, report.guest_state)]


def guest_line(
    guest_on: GuestOn,
    guest_state: str | None = None,
    *,
    simulated_role: Role | None = None,
    recovery: str | None = None,
) -> str:
    """Say where the guest is, and when something must be done about it, what.

    Args:
        guest_on: As far as it is known.
        guest_state: QEMU's run state there, e.g. ``running`` or ``paused``; ``None`` = unknown.
        simulated_role: Which command says so of a simulated guest; ``None`` = it is a QEMU's.
        recovery: What to type about it; ``None`` = there is nothing.
    """
    if simulated_role is not None and guest_on in {GuestOn.NEITHER, GuestOn.UNKNOWN}:
        return _simulated_line(guest_on, simulated_role)
    match guest_on:
        case GuestOn.SOURCE | GuestOn.DESTINATION:
            side = guest_on.value
            if guest_state in {None, "running"}:
                return f"the guest {'runs' if guest_state else 'is'} on the {side}"
            who = "its state is" if simulated_role else "QEMU says"
            return f"the guest is on the {side}, not running: {who} '{guest_state}'"
        case GuestOn.NEITHER if recovery is not None:
            return f"the guest runs on NEITHER side; to bring it back: {recovery}"
        case GuestOn.UNKNOWN if recovery is not None:
            return f"{_UNKNOWN}: start it nowhere before this has said where: {recovery}"
        case GuestOn.NEITHER:
            return (
                "the guest runs on NEITHER side; "
                "if the source QEMU still lives, 'cont' on it brings the guest back"
            )
        case GuestOn.UNKNOWN:
            return (
                f"{_UNKNOWN}: start it nowhere before "
                "'query-status' on the destination QEMU said that it does not run there"
            )
        case GuestOn.HANDED_OVER:
            return "the guest was handed over: whoever owns both monitors decides where it runs"


def _simulated_line(guest_on: GuestOn, role: Role) -> str:
    """There is no monitor to ask or to say 'cont' to: either side ends with its command."""
    known = "the guest runs on NEITHER side" if guest_on is GuestOn.NEITHER else _UNKNOWN
    if role == "destination":
        return f"{known}: at the source if migrate-src still lives, otherwise it is gone"
    if guest_on is GuestOn.NEITHER:
        return f"{known}; the copy here ends with this command"
    return (
        f"{known}: the copy here ends with this command; whether the guest ran there, "
        "migrate-dst's last line or its state file says"
    )


def shortened(rounds: Sequence[RoundReport]) -> list[RoundReport | None]:
    """Leave out the middle of a long list of rounds; ``None`` stands for what is left out."""
    if len(rounds) <= _FIRST_ROUNDS + _LAST_ROUNDS + 1:
        return list(rounds)
    return [*rounds[:_FIRST_ROUNDS], None, *rounds[-_LAST_ROUNDS:]]


def share_text(part: float, whole: float) -> str:
    """Print a share of a whole as percent, with a digit more where it is small."""
    if whole <= 0:
        return "-"
    percent = 100 * part / whole
    return f"{percent:.1f} %" if percent < 9.95 else f"{percent:.0f} %"


def _headline(report: Report) -> list[str]:
    total = format_ms(report.total_ms)
    if report.setup_ms is not None:
        total += f", {format_ms(report.setup_ms)} of it setting up"
    state = report.guest_state or "state not known"
    lines = [
        _labelled("guest", f"{report.guest_on.value}, {state}"),
        _labelled("total", total),
    ]
    if report.role == "source":  # the other side can't know when the guest stopped
        lines.append(_labelled("downtime", _downtime_text(report)))
    if report.service is not None:
        lines.append(_labelled("service", _under_each_other(service_texts(report.service))))
    if report.guest_stolen_ms:
        stolen = f"{format_ms(report.guest_stolen_ms)} of it lost: this host was too busy"
        lines.append(_labelled("guest time", stolen))
    wire = f"{format_size(report.wire_bytes)} for {format_size(report.page_bytes)} of pages"
    lines.append(
        _labelled("on the wire", f"{wire} ({share_text(report.wire_bytes, report.page_bytes)})")
    )
    lines.append(_labelled("guest RAM", format_size(report.ram_bytes)))
    lines += [_labelled(label, text) for label, text in unused_memory(report)]
    lines += _old_copy_lines(report)
    if report.commit is not None:
        lines.append(_labelled("commit", report.commit))
    if report.qemu_version is not None:
        lines.append(_labelled("QEMU", report.qemu_version))
    if report.reconnects:
        lines.append(_labelled("reconnects", _reconnects_text(report)))
    if report.back_to_precopy:
        lines.append(_labelled("went back", _back_text(report)))
    if report.predicted is not None:
        predicted = report.predicted
        times = format_ms(predicted.total_ms), format_ms(predicted.downtime_ms)
        lines.append(_labelled("predicted", f"total {times[0]}, downtime {times[1]}"))
    return lines


def _back_text(report: Report) -> str:
    times = "once" if report.back_to_precopy == 1 else f"{report.back_to_precopy} times"
    if report.role == "destination":
        return f"to pre-copy {times}"
    stood_still = format_ms(report.back_to_precopy_stopped_ms)
    return f"to pre-copy {times}, after the guest had stood still for {stood_still}"


def _reconnects_text(report: Report) -> str:
    away = f"{format_ms(report.outage_ms)} without a link"
    return f"{report.reconnects}, {away}, {format_size(report.bytes.resent)} sent again"


def unused_memory(report: Report) -> list[tuple[str, str]]:
    """Tell of memory whose content did not travel because the guest does not use it."""
    found = []
    balloon = report.balloon
    if balloon is not None and balloon.kept_bytes is not None:
        sizes = [format_size(n or 0) for n in (balloon.before_bytes, balloon.kept_bytes)]
        pages = format_count(balloon.pages)
        found.append(("balloon", f"{sizes[0]}, then {sizes[1]}: {pages} pages travel as zero"))
    if report.free_page_hinting and report.never_sent_pages is not None:
        pages = format_count(report.never_sent_pages)
        found.append(("free pages", f"{pages} never travelled: the guest hints at them"))
    elif report.free_page_hinting is False:
        found.append(("free pages", "the guest does not hint at them (docs/balloon.md)"))
    return found


def _old_copy_lines(report: Report) -> list[str]:
    lines = []
    if (old := report.old_copy) is not None:
        age = f", {format_ms(old.age_s * 1000)} old" if old.age_s is not None else ""
        text = f"{format_count(old.referenced_pages)} pages ({format_size(old.saved_bytes)})"
        lines.append(
            _labelled("old copy", f"{text} of {format_count(old.announced_pages)}{age}")
        )
    if report.checkpoint is not None and report.checkpoint.kept:
        kept = report.checkpoint
        lines.append(_labelled("checkpoint", f"{format_size(kept.file_bytes)}, {kept.path}"))
    return lines


def _downtime_text(report: Report) -> str:
    if report.downtime_ms is None and report.back_to_precopy_stopped_ms:
        return f"{format_ms(report.back_to_precopy_stopped_ms)} at the source, without a link"
    if report.downtime_ms is None and report.guest_stopped:
        return "the guest was stopped, and nobody saw when it went on"
    if report.downtime_ms is None:
        return "none: the guest was not stopped"
    parts = [
        f"{name} {format_ms(duration_ms)}"
        for attribute, name in PART_NAMES.items()
        if (duration_ms := getattr(report.downtime, attribute)) is not None
    ]
    half = len(parts) // 2 + 1
    lines = [format_ms(report.downtime_ms), ", ".join(parts[:half]), ", ".join(parts[half:])]
    return _under_each_other(lines)


def service_texts(service: Service) -> list[str]:
    """Tell in a few lines what a client noticed: rates and the gap, then latencies."""
    rates = [_rate_text(service.before, "before")]
    measured = [n for n, figures in service.rounds.items() if figures.get("completed_per_s")]
    if measured:
        slowest = min(measured, key=lambda n: service.rounds[n].get("completed_per_s") or 0)
        every = f"{'at worst ' if len(measured) > 1 else ''}in round {slowest}"
        rates.append(_rate_text(service.rounds[slowest], every))
    if service.downtime_gap_ms is not None:
        rates.append(f"gap {format_ms(service.downtime_gap_ms)}")
    if service.after:
        rates.append(_rate_text(service.after, "after"))
    phases = (
        ("before", service.before),
        ("downtime", service.downtime),
        ("after", service.after),
    )
    waits = [
        _latency_text(figures, name) for name, figures in phases if "latency_max_ms" in figures
    ]
    everything = (service.before, *service.rounds.values(), service.downtime, service.after)
    lost = sum(figures.get("lost") or 0 for figures in everything)
    lines = [", ".join(rates)]
    if waits:
        lines.append("latency p50/p99/max " + waits[0])
        lines += [", ".join(waits[1:])] if waits[1:] else []
    return [*lines, f"{format_count(round(lost))} requests lost"] if lost else lines


def service_row(name: str, figures: ServiceFigures) -> tuple[str, ...]:
    """Print the figures of a phase as cells: rate, sent, lost, latency p50, p99, max."""
    counts = [figures.get(key) for key in ("completed_per_s", "sent", "lost")]
    waits = [figures.get(f"latency_{key}_ms") for key in ("p50", "p99", "max")]
    return (
        name,
        *("-" if value is None else format_count(round(value)) for value in counts),
        *("-" if value is None else format_ms(value) for value in waits),
    )


def _rate_text(figures: ServiceFigures, when: str) -> str:
    rate = figures.get("completed_per_s")
    return f"{'-' if rate is None else format_count(round(rate))}/s {when}"


def _latency_text(figures: ServiceFigures, when: str) -> str:
    found = [figures.get(f"latency_{name}_ms") for name in ("p50", "p99", "max")]
    return f"{'/'.join('-' if ms is None else _short(ms) for ms in found)} ms {when}"


def _short(duration_ms: float) -> str:
    return f"{duration_ms:.0f}" if duration_ms >= 9.95 else f"{duration_ms:.1f}"


def _under_each_other(lines: Sequence[str]) -> str:
    return f"\n{'':{_LABEL_WIDTH + 3}}".join(filter(None, lines))


def _class_table(report: Report) -> list[str]:
    rows = [("class", "pages", "share", "on the wire", "per page")]
    all_pages = report.pages.total()
    if not all_pages:
        return []
    for name in PAGE_CLASSES:
        pages, n_bytes = getattr(report.pages, name), getattr(report.bytes, name)
        per_page = f"{n_bytes / pages:.1f} B" if pages else "-"
        share = share_text(pages, all_pages)
        rows.append((name, format_count(pages), share, format_size(n_bytes), per_page))
    others = [
        (kind.replace("_", " "), "", "", format_size(n_bytes), "")
        for kind in BYTE_KINDS
        if kind not in PAGE_CLASSES and (n_bytes := getattr(report.bytes, kind))
    ]
    return ["", *_aligned([*rows, *others])]


def _round_table(rounds: Sequence[RoundReport]) -> list[str]:
    if not rounds:
        return []
    rows: list[tuple[str, ...]] = [ROUND_COLUMNS]
    cut_row = -1
    for this_round in shortened(rounds):
        if this_round is None:
            cut_row = len(rows)
            continue
        rows.append(round_row(this_round))
    lines = _aligned(rows, first_width=len(ROUND_COLUMNS[0]))
    if cut_row >= 0:
        left_out = len(rounds) - _FIRST_ROUNDS - _LAST_ROUNDS
        lines.insert(cut_row, f"  … {left_out} more rounds, all in --report")
    return ["", *lines]


def round_row(this_round: RoundReport) -> tuple[str, ...]:
    """Print a round as cells under ``ROUND_COLUMNS``."""
    goodput, dirty = this_round.goodput_bps, this_round.dirty_pages_per_s
    throttle = this_round.throttle_percent
    return (
        str(this_round.n),
        format_ms(this_round.duration_ms),
        format_count(this_round.pages.total()),
        format_size(this_round.wire_bytes),
        "-" if goodput is None else format_rate(goodput),
        "-" if dirty is None else format_count(round(dirty)),
        this_round.codec or "-",
        f"{throttle} %" if throttle else "-",
    )


def _device_table(devices: Sequence[SimulatedDeviceReport] | None) -> list[str]:
    if not devices:
        return []
    rows = [DEVICE_COLUMNS, *map(device_row, devices)]
    return ["", *_aligned([tuple(row[at] for at in _SHOWN_COLUMNS) for row in rows])]


def device_row(device: SimulatedDeviceReport) -> tuple[str, ...]:
    """Print a simulated device as cells under ``DEVICE_COLUMNS``."""
    phases: tuple[DeviceCounts | None, ...] = (device.before, device.during, device.after)
    return (
        device.name,
        _count_text(device.requests),
        _count_text(device.exits),
        _count_text(device.exits_saved),
        _each_text(device.exits_per_request),
        *(_each_text(counts.exits_per_request if counts else None) for counts in phases),
        _count_text(device.interrupts),
        _count_text(device.interrupts_saved),
        _count_text(device.dropped),
    )


def _count_text(count: int | None) -> str:
    return "-" if count is None else format_count(count)


def _each_text(each: float | None) -> str:
    return "-" if each is None else f"{each:.2f}"


def _checks(report: Report) -> list[str]:
    integrity = report.integrity
    if integrity.equal is None:
        text = "not compared: it did not come to that"
    elif integrity.equal:
        text = f"equal, {format_count(integrity.pages)} pages compared"
    else:
        text = f"NOT EQUAL over {format_count(integrity.pages)} pages"
    lines = ["", _labelled("integrity", text)]
    if report.opaque_rest is not None:
        lines.append(
            _labelled("passed on", f"part of the stream as it was: {report.opaque_rest}")
        )
    lines += [_labelled("not checked", text) for text in report.not_checked]
    lines += [_labelled("warning", text) for text in report.warnings]
    return lines


def _labelled(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}} {text}"


def _aligned(rows: Sequence[tuple[str, ...]], *, first_width: int = _LABEL_WIDTH) -> list[str]:
    """Align columns of figures to the right, the first column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"  {row[0]:<{max(widths[0], first_width)}}", *cells]).rstrip())
    return lines
