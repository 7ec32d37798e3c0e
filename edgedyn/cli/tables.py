"""Tables of the command line, in the first of three layouts that fits the terminal.

    one line per row, prose folded
    first column on a line of its own, the others below it; a repeated first cell is printed once
    one line per cell

Names stay whole; prose breaks between words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgedyn.cli.terminal import detail, fold, line_width, result

if TYPE_CHECKING:
    from edgedyn.report.rows import Row

_GAPS = (2, 1)  # blanks between columns: 2 where the table then fits, else 1
_LEAST_PROSE = 24  # columns; narrower prose reads worse than a line per cell


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        right: cells stand at the right, as numbers do.
        prose: cells may break between words, and hold several lines.
    """

    name: str
    right: bool = False
    prose: bool = False


def print_details(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table that --quiet leaves out, laid out as ``table_lines`` says."""
    if title:
        detail(title, style="bold")
    head, *lines = table_lines(columns, rows, line_width())
    detail(head, style="bold")
    for line in lines:
        detail(line)


def print_results(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is the result of a command."""
    head, *lines = table_lines(columns, rows, line_width())
    result(head, style="bold")
    for line in lines:
        result(line)


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Lay a table out within ``width`` columns, the heading first; only prose breaks, and between words.

    Three layouts, the first that fits: one line per row, prose folded; the first column on a line of its own
    and the others below it; every cell on lines of its own.
    """
    widths = [
        max(len(line) for cell in (column.name, *(row[i] for row in rows)) for line in cell.split("\n"))
        for i, column in enumerate(columns)
    ]
    for gap in _GAPS:
        if fitted := _fit(columns, rows, widths, width, gap):
            return _lines(columns, rows, fitted, gap)
    gap, lower = _GAPS[0], [row[1:] for row in rows]
    rest = _fit(columns[1:], lower, widths[1:], width and width - 2, gap)
    if rest and len(columns) > 2:
        blocks = _blocks(columns[1:], lower, rest, gap)
        names = [columns[0].name, *(row[0] for row in rows)]
        lines = []
        for name, previous, block in zip(names, [None, *names], blocks, strict=False):
            lines += [*([name] if name != previous else []), *(f"  {line}" for line in block)]
        return lines
    lines = [columns[0].name]
    for row in rows:
        cells = [f"  {c.name}: {cell}" for c, cell in zip(columns[1:], row[1:], strict=True) if cell]
        lines += [row[0], *"\n".join(fold(cell, width=width, indent="    ") for cell in cells).split("\n")]
    return lines


def _fit(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    width: int | None,
    gap: int,
) -> list[int] | None:
    """Return the widths of the columns within ``width``, or None where they do not fit."""
    excess = 0 if width is None else sum(widths) + gap * (len(widths) - 1) - width
    fitted = list(widths)
    for i in sorted(range(len(columns)), key=lambda i: -widths[i]):
        if excess > 0 and columns[i].prose:
            words = [len(word) for row in rows for word in row[i].split()]
            least = min(fitted[i], max(_LEAST_PROSE, *words, 0))
            taken = min(excess, fitted[i] - least)
            fitted[i], excess = fitted[i] - taken, excess - taken
    return fitted if excess <= 0 else None


def _lines(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int], gap: int
) -> list[str]:
    """Return the lines of a table, its heading first."""
    return [line for block in _blocks(columns, rows, widths, gap) for line in block]


def _blocks(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int], gap: int
) -> list[list[str]]:
    """Return the lines of the heading and of each row."""
    blocks = []
    for row in ([column.name for column in columns], *rows):
        cells = [fold(cell, width=size).split("\n") for cell, size in zip(row, widths, strict=True)]
        height = max(len(cell) for cell in cells)
        block = []
        for parts in zip(*([*cell, *[""] * (height - len(cell))] for cell in cells), strict=True):
            placed = (
                part.rjust(size) if column.right else part.ljust(size)
                for part, size, column in zip(parts, widths, columns, strict=True)
            )
            block.append((" " * gap).join(placed).rstrip())
        blocks.append(block)
    return blocks


_ROW_COLUMNS = (
    Column("between"),
    Column("metric"),
    Column("value", right=True),
    Column("limit"),
    Column("of", right=True),
    Column(""),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the rows of a validation report."""
    signs = {"at_most": "<=", "at_least": ">="}
    cells = []
    for row in rows:
        limit = " ".join(f"{signs[key]} {value:.4g}" for key, value in row.limit.items())
        word = "FAILED" if not row.passed else "passed" if row.limit else "reported"
        cells.append((row.between, row.metric, f"{row.value:.4g}", limit, str(row.samples), word))
    print_details(_ROW_COLUMNS, cells)
