"""Draws the tables of docs/benchmarks.md that are curves, as SVG: each table under one of the headings below is a plot.

    benches/plots.py FILE.md FOLDER

The benchmarks call `draw` with what they print, so a plot shows the figures of the table beside it, and nothing else.
"""

import math
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "plots"
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 84, 20, 64, 56
COLOURS = ("#0b62a8", "#c2410c", "#2e7d32", "#7b3fa0")


@dataclass(frozen=True)
class Plot:
    """What a table is drawn as: its first column across, these columns as lines. Those in `bounds` are dashed."""

    file: str
    x: str
    y: str
    columns: tuple[str, ...]
    bounds: tuple[str, ...] = ()
    log_x: bool = True
    log_y: bool = False


RATES = ("pg_tessera", "bound")
PLOTS = {
    "Rows of a batch": Plot("batch-size", "tessera.batch_size", "rows/s", ("pg_tessera", "bound", "bound at this size"), ("bound", "bound at this size"), log_y=True),
    "Parallel workers": Plot("workers", "workers beside the leader", "rows/s", RATES, ("bound",), log_x=False),
    "Rows of the table": Plot("table-size", "rows of the table", "rows/s", RATES, ("bound",)),
    "Width of the model": Plot("model-width", "W of a network 28-W-2", "rows/s", RATES, ("bound",), log_y=True),
    "Throughput against clients": Plot("clients", "clients", "answers/s", ("answers/s",)),
    "Block cache: many clients": Plot("cache-clients", "clients", "predictions/s", ("per second",)),
    "Recovering a set against generations": Plot("sets", "generation", "s, all members", ("kept whole", "update", "provenance"), log_x=False, log_y=True),
    "Recovering a member against generations": Plot("sets-member", "generation", "ms, one member", ("kept whole", "update", "provenance"), log_x=False, log_y=True),
}


@dataclass
class Axis:
    """From values to places between `first` and `last` (pixels)."""

    low: float
    high: float
    first: float
    last: float
    log: bool

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.first + (self.last - self.first) * (value - low) / ((high - low) or 1)


def short(value: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}" if value % (unit / 100) == 0 else f"{value / unit:.3g}{name}"
    return f"{value:g}"


def number(cell: str) -> float:
    return float(cell.replace(",", "").replace("*", ""))


def tables(markdown: str) -> dict[str, list[dict[str, str]]]:
    """The first table under each heading: its rows by column."""
    found: dict[str, list[dict[str, str]]] = {}
    heading, head = "", None
    for line in markdown.splitlines():
        if title := re.match(r"#+ (.*)", line):
            heading, head = title[1].strip(), None
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if head is None and heading not in found:
                head, found[heading] = cells, []
            elif head and not set(line) <= set("|-: "):
                found[heading].append(dict(zip(head, cells)))
        else:
            head = None
    return found


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values: 1, 2 and 5 times powers of ten where the axis is logarithmic, else equal steps."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 1000 else (1,)
        return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 2.5, 5, 10) if (high - low) / (times * step) <= 6)
    return [low + step * n for n in range(int((high - low) / step) + 1)]


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def svg(title: str, plot: Plot, rows: list[dict[str, str]]) -> str:
    first = next(iter(rows[0]))
    xs = [number(row[first]) for row in rows]
    series = {name: [number(row[name]) for row in rows] for name in plot.columns}
    values = [value for line in series.values() for value in line]
    low = min(values) / 1.3 if plot.log_y else 0.0
    across = Axis(min(xs), max(xs), LEFT + 12, WIDTH - RIGHT - 12, plot.log_x)
    up = Axis(low, max(values) * (1.3 if plot.log_y else 1.08), HEIGHT - BOTTOM, TOP, plot.log_y)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#222">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', text(LEFT, 22, title, "start", ' font-size="15" font-weight="bold"')]
    for value in ticks(up.low, up.high, up.log):
        y = up.at(value)
        parts += [f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>', text(LEFT - 6, y + 4, short(value), "end")]
    for value in xs:
        parts += [f'<path d="M{across.at(value):.1f} {HEIGHT - BOTTOM}v5" stroke="#888"/>', text(across.at(value), HEIGHT - BOTTOM + 19, short(value))]
    parts += [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>', text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, plot.x),
              text(18, (TOP + HEIGHT - BOTTOM) / 2, plot.y, more=f' transform="rotate(-90 18 {(TOP + HEIGHT - BOTTOM) / 2:.0f})"')]
    place = LEFT
    for colour, (name, line) in zip(COLOURS, series.items()):
        dashes = ' stroke-dasharray="7 5"' if name in plot.bounds else ""
        points = [(across.at(x), up.at(y)) for x, y in zip(xs, line)]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts += [f'<path d="M{place} 42h26" stroke="{colour}" stroke-width="2"{dashes}/>', text(place + 32, 46, name, "start")]
        place += 60 + 7 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def draw(markdown: str, folder: Path) -> list[Path]:
    """Draws what it finds of the plots; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for heading, rows in tables(markdown).items():
        if heading in PLOTS and rows:
            path = folder / f"{PLOTS[heading].file}.svg"
            path.write_text(svg(heading, PLOTS[heading], rows))
            written.append(path)
    return written


if __name__ == "__main__":
    for drawn in draw(Path(sys.argv[1]).read_text(), Path(sys.argv[2])):
        print(drawn)
