"""The two drawings of the HTML report, as inline SVG.

Pure. Colours are CSS variables of the page, so both light and dark are drawn once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 900
_PLOT_HEIGHT: Final = 110
_TOP: Final = 26
_LEFT: Final = 80
_BAR_HEIGHT: Final = 30
_COLOURS: Final = 5
_MAX_LABELS: Final = 20


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a whole: its name, its size, and its size as text."""

    name: str
    value: float
    text: str


def segment_bar(segments: Sequence[Segment]) -> str:
    """Draw parts of a whole as one bar with a key beneath; empty when the whole is 0."""
    whole = sum(segment.value for segment in segments)
    if whole <= 0:
        return ""
    parts, keys, x = [], [], 0.0
    for number, segment in enumerate(segments):
        width = _WIDTH * segment.value / whole
        colour = f"var(--c{number % _COLOURS})"
        label = escape(f"{segment.name} {segment.text}")
        parts.append(
            f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="{_BAR_HEIGHT}" '
            f'style="fill:{colour}"><title>{label}</title></rect>'
        )
        keys.append(f'<span><i style="background:{colour}"></i>{label}</span>')
        x += width
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_BAR_HEIGHT}" role="img">{"".join(parts)}</svg>'
        f'<div class="key">{"".join(keys)}</div>'
    )


def column_chart(
    title: str, values: Sequence[tuple[int, float | None]], print_value: Callable[[float], str]
) -> str:
    """Draw one column per round.

    Args:
        title: Stands above.
        values: Round number and value; ``None`` leaves a gap.
        print_value: Prints a value for the axis and for the pointer.

    Returns:
        An ``svg`` element; empty when there is no value above 0.
    """
    highest = max((value for _, value in values if value is not None), default=0.0)
    if highest <= 0:
        return ""
    step = (_WIDTH - _LEFT) / len(values)
    width = max(1.0, min(48.0, 0.8 * step))
    every = -(-len(values) // _MAX_LABELS)
    bottom = _TOP + _PLOT_HEIGHT
    parts = [f'<text x="0" y="12">{escape(title)}</text>', _grid(highest, print_value)]
    for position, (number, value) in enumerate(values):
        middle = _LEFT + (position + 0.5) * step
        if position % every == 0:
            parts.append(
                f'<text x="{middle:.1f}" y="{bottom + 14}" text-anchor="middle">{number}</text>'
            )
        if value is None:
            continue
        height = _PLOT_HEIGHT * value / highest
        label = escape(f"round {number}: {print_value(value)}")
        parts.append(
            f'<rect class="bar" x="{middle - width / 2:.1f}" y="{bottom - height:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}"><title>{label}</title></rect>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 24}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _grid(highest: float, print_value: Callable[[float], str]) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        y = _TOP + _PLOT_HEIGHT * (1 - share)
        lines.append(
            f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(print_value(share * highest))}</text>"
        )
    return "".join(lines)
