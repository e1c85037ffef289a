"""``--html``: the report as one page that needs nothing else: no script, no font, no network.

Pure: report in, text out. Figures come from ``summary``, so page and terminal say the same.
"""

from collections.abc import Sequence
from html import escape
from typing import Final

from migrate.report.ledger import BYTE_KINDS, PAGE_CLASSES
from migrate.report.report import Report
from migrate.report.summary import (
    DEVICE_COLUMNS,
    PART_NAMES,
    ROUND_COLUMNS,
    device_row,
    round_row,
    service_row,
    share_text,
    summary_lines,
    unused_memory,
)
from migrate.report.svg import Segment, column_chart, segment_bar
from migrate.units import format_count, format_ms, format_rate, format_size

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #d9dee6;
  --page: #f6f7f9; --card: #fff; --bar: #2f6fb2; --good: #1d7a46; --bad: #b3261e;
  --c0: #2f6fb2; --c1: #d07a1f; --c2: #4f9a6b; --c3: #8a63b8; --c4: #6b7686; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4;
  --line: #333c49; --page: #14181e; --card: #1c222b; --bar: #6ba6e3; --good: #63c48d;
  --bad: #f2857c; --c0: #6ba6e3; --c1: #e3a059; --c2: #7dc396; --c3: #b596dc; --c4: #99a4b3; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; }
h1 { font-size: 1.35rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.2rem; margin-top: 1rem; overflow-x: auto; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--soft); }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(10rem,
1fr)); } .figures b { display: block; font-size: 1.5rem; font-weight: 600; } table {
border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } th, td {
text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .bar { fill: var(--bar); } svg .grid { stroke: var(--line); }
ul { margin: 0; padding-left: 1.2rem; }
.key span { display: inline-block; margin: .4rem 1rem 0 0; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
"""


def report_html(report: Report) -> str:
    """Draw the page. All text from the report is escaped: names come from guests and peers."""
    title = f"Migration {report.status}"
    sections = [
        _head(report, title),
        _figures(report),
        _downtime(report),
        _service(report),
        _round_charts(report),
        _class_table(report),
        _round_table(report),
        _simulated_devices(report),
        _notes(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report, title: str) -> str:
    colour = "good" if report.status == "completed" else "bad"
    about = [f"seen by the {report.role}"]
    about += [report.started_utc] if report.started_utc else []
    about += [f"QEMU {report.qemu_version}"] if report.qemu_version else []
    about += [f"commit {report.commit}"] if report.commit else []
    lines = [
        f'<header><h1 class="{colour}">{escape(title)}</h1>',
        f"<p>{escape(summary_lines(report)[-1])}</p>",
    ]
    if report.error is not None:
        text = f"{report.error.message} [{report.error.code}]"
        lines.append(f'<p class="bad">{escape(text)}</p>')
    lines.append(f'<p class="soft">{escape(" · ".join(about))}</p></header>')
    return "\n".join(lines)


def _figures(report: Report) -> str:
    unseen = "not seen" if report.guest_stopped else "none"
    seen_ms = report.downtime_ms
    if seen_ms is None:  # it may have gone on at the source
        seen_ms = report.back_to_precopy_stopped_ms or None
    downtime = unseen if seen_ms is None else format_ms(seen_ms)
    integrity = {True: "equal", False: "NOT EQUAL", None: "not compared"}[
        report.integrity.equal
    ]
    wire_share = share_text(report.wire_bytes, report.page_bytes)
    figures = [
        ("total", format_ms(report.total_ms), _setup_text(report)),
        ("downtime", downtime, "the guest stood still"),
        ("on the wire", format_size(report.wire_bytes), f"{wire_share} of the pages' bytes"),
        ("guest RAM", format_size(report.ram_bytes), f"{len(report.rounds)} rounds"),
        ("RAM on both sides", integrity, f"{format_count(report.integrity.pages)} pages"),
    ]
    if (old := report.old_copy) is not None:
        pages = f"{format_count(old.referenced_pages)} pages were there"
        figures.append(("old copy", format_size(old.saved_bytes), pages))
    cells = "".join(
        f'<div><span class="soft">{escape(label)}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(note)}</span></div>'
        for label, value, note in figures
    )
    return f'<section class="figures">{cells}</section>'


def _setup_text(report: Report) -> str:
    return "" if report.setup_ms is None else f"{format_ms(report.setup_ms)} setting up"


def _downtime(report: Report) -> str:
    if report.downtime_ms is None:
        return ""
    segments = [
        Segment(name, duration_ms, format_ms(duration_ms))
        for attribute, name in PART_NAMES.items()
        if (duration_ms := getattr(report.downtime, attribute)) is not None
    ]
    title = f"Downtime {format_ms(report.downtime_ms)}"
    return f"<section><h2>{escape(title)}</h2>{segment_bar(segments)}</section>"


def _service(report: Report) -> str:
    service = report.service
    if service is None:
        return ""
    phases = [("before", service.before)]
    phases += [(f"round {n}", figures) for n, figures in service.rounds.items()]
    phases += [("downtime", service.downtime), ("after", service.after)]
    rows = [service_row(name, figures) for name, figures in phases if figures]
    gap = service.downtime_gap_ms
    title = "What a client noticed" + ("" if gap is None else f": gap {format_ms(gap)}")
    head = ("phase", service.unit, "sent", "lost", "latency p50", "p99", "max")
    return f"<section><h2>{escape(title)}</h2>{_table(head, rows)}</section>"


def _round_charts(report: Report) -> str:
    rounds = report.rounds
    if not rounds:
        return ""
    charts = [
        column_chart(
            "Bytes on the wire",
            [(this_round.n, this_round.wire_bytes) for this_round in rounds],
            format_size,
        ),
        column_chart(
            "Goodput",
            [(this_round.n, this_round.goodput_bps) for this_round in rounds],
            format_rate,
        ),
        column_chart(
            "Pages the guest dirtied per second",
            [(this_round.n, this_round.dirty_pages_per_s) for this_round in rounds],
            lambda value: format_count(round(value)),
        ),
    ]
    body = "".join(charts)
    return f"<section><h2>Rounds</h2>{body}</section>"


def _class_table(report: Report) -> str:
    all_pages = report.pages.total()
    rows: list[Sequence[str]] = []
    for kind in BYTE_KINDS:
        n_bytes = getattr(report.bytes, kind)
        pages = getattr(report.pages, kind) if kind in PAGE_CLASSES else None
        rows.append(
            (
                kind.replace("_", " "),
                "" if pages is None else format_count(pages),
                "" if pages is None else share_text(pages, all_pages),
                format_size(n_bytes),
                share_text(n_bytes, report.wire_bytes),
            )
        )
    rows.append(("total", format_count(all_pages), "", format_size(report.wire_bytes), ""))
    head = ("class", "pages", "of all pages", "on the wire", "of all bytes")
    return f"<section><h2>Pages and bytes</h2>{_table(head, rows)}</section>"


def _round_table(report: Report) -> str:
    if not report.rounds:
        return ""
    rows = [round_row(this_round) for this_round in report.rounds]
    return f"<section><h2>Every round</h2>{_table(ROUND_COLUMNS, rows)}</section>"


def _simulated_devices(report: Report) -> str:
    if not report.simulated_devices:
        return ""
    rows = [device_row(device) for device in report.simulated_devices]
    note = '<p class="soft">before, during, after: exits per request</p>'
    table = _table(DEVICE_COLUMNS, rows)
    return f"<section><h2>Simulated devices</h2>{note}{table}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"


def _notes(report: Report) -> str:
    notes = [f"{label}: {text}" for label, text in unused_memory(report)]
    notes += report.warnings
    notes += [f"not checked: {text}" for text in report.not_checked]
    if report.opaque_rest is not None:
        notes.append(f"part of the stream was passed on as it was: {report.opaque_rest}")
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>"
