"""Tables keep names whole at any width; prose breaks between words."""

from __future__ import annotations

import pytest

from edgedyn.cli.tables import Column, print_rows, table_lines
from edgedyn.cli.terminal import fold
from edgedyn.report.rows import Row

NAMES = ("levels.3.2", "a_very_long_name_of_a_layer.that.goes.on.body.0")
COLUMNS = (Column("layer"), Column("meaning", prose=True), Column("ms", right=True))
ROWS = [
    (NAMES[0], "one sentence that says at some length, for a table, how it is", "1.5"),
    (NAMES[1], "short", "12.25"),
]


def row(layer: str, meaning: str, ms: str, prose: int) -> str:
    return f"{layer:<47}  {meaning:<{prose}}  {ms:>5}".rstrip()


def test_a_table_is_one_line_per_row_in_a_pipe():
    assert table_lines(COLUMNS, ROWS, None) == [
        row(*cells, len(ROWS[0][1])) for cells in (("layer", "meaning", "ms"), *ROWS)
    ]


def test_prose_is_folded_between_words_where_a_row_does_not_fit():
    assert table_lines(COLUMNS, ROWS, 80) == [
        row("layer", "meaning", "ms", 24),
        row(NAMES[0], "one sentence that says", "1.5", 24),
        row("", "at some length, for a", "", 24),
        row("", "table, how it is", "", 24),
        row(NAMES[1], "short", "12.25", 24),
    ]


def test_the_first_column_stands_above_the_others_where_it_leaves_no_room():
    assert table_lines(COLUMNS, ROWS, 50) == [
        "layer",
        "  meaning                                       ms",
        NAMES[0],
        "  one sentence that says at some length,       1.5",
        "  for a table, how it is",
        NAMES[1],
        "  short                                      12.25",
    ]


def test_each_cell_has_its_line_where_nothing_else_fits():
    assert table_lines(COLUMNS, ROWS, 30) == [
        "layer",
        NAMES[0],
        "  meaning: one sentence that",
        "    says at some length, for a",
        "    table, how it is",
        "  ms: 1.5",
        NAMES[1],
        "  meaning: short",
        "  ms: 12.25",
    ]


@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80, 200])
def test_every_word_is_whole_at_every_width(width):
    lines = table_lines(COLUMNS, ROWS, width)
    words = " ".join(lines).split()
    for word in " ".join(cell for cells in ROWS for cell in cells).split():
        assert word in words
    longest = max(map(len, words))
    assert max(map(len, lines)) <= max(width, longest + 6)


def test_only_prose_breaks():
    columns = (Column("metric"), Column("limit"), Column("meaning", prose=True))
    lines = table_lines(columns, [("psnr_db", "<= 0.0009804", "one sentence of some length for a table")], 50)
    assert lines[1] == "psnr_db  <= 0.0009804  one sentence of some length"
    assert lines[2].strip() == "for a table"
    name = "a file name with blanks, longer than prose at its narrowest.png"
    for width in (20, 60, 80):
        lines = table_lines(columns[1:], [(name, "one sentence of some length for a table")], width)
        assert sum(name in line for line in lines) == 1


def test_equal_first_cells_in_a_row_stand_once():
    lines = table_lines(COLUMNS, [ROWS[1], ROWS[1], ROWS[0]], 50)
    assert [line for line in lines if not line.startswith(" ")] == ["layer", NAMES[1], NAMES[0]]
    assert lines.count("  short                                      12.25") == 2


def test_an_empty_table_is_its_heading():
    assert table_lines(COLUMNS, [], 80) == ["layer  meaning  ms"]


def test_lines_of_prose_fold_and_a_path_does_not():
    assert fold("one two three", width=8, indent="  ") == "one two\n  three"
    assert fold("/a/very-long/path.png", width=8) == "/a/very-long/path.png"


def test_metrics_of_rows_stay_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    metric = "max_abs[vectors/a-very-long-name-of-a-vector.input.npy]"
    print_rows([Row("device:vectors", metric, 1.0, {"at_most": 2.0}, 1)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(metric in line for line in lines) == 1
    assert max(map(len, lines)) <= 80
