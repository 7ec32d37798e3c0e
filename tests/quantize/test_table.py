"""The calibration table: written whole, read whole, refused where a digest does not match."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest

from edgedyn.errors import CalibrationError, UsageError
from edgedyn.quantize.observe.histogram import Histogram
from edgedyn.quantize.table.entries import Entry, Outcome, sealed
from edgedyn.quantize.table.table import CalibrationTable, _whole, read_table, refuse_place

KEY = {"model": {"network": "net", "weights": "ab"}, "data": "cd", "forms": {}}


def entry(name: str, *, is_weight: bool = False) -> Entry:
    histogram = Histogram.of(np.random.default_rng(len(name)).standard_normal(50))
    if is_weight:
        return Entry(name, "weight", histogram, "minmax", channels=(0.25, 0.1))
    return Entry(name, "feature", histogram, "mse", (0.1, -3), 0.2)


@pytest.fixture
def table() -> CalibrationTable:
    programs = {
        "router": (entry("x"),),
        "wide": (entry("x"), entry("a.conv2d"), entry("a.weight", is_weight=True)),
    }
    constants = {
        "wide/a.weight": np.arange(-3, 3, dtype=np.int8).reshape(2, 3),
        "wide/a.bias": np.float32([1, 2]),
    }
    images, coverage = {"name": "photos", "files": [{"name": "a.png"}]}, (Outcome("mask", "a", 3, 7, 4),)
    return CalibrationTable(KEY, images, programs, constants, coverage=coverage)


def same(a: CalibrationTable, b: CalibrationTable) -> bool:
    entries = [[[e.to_json() for e in part] for part in t.programs.values()] for t in (a, b)]
    arrays = [{name: (x.dtype, x.tolist()) for name, x in t.constants.items()} for t in (a, b)]
    return (a.key, a.images, list(a.programs), entries[0], arrays[0]) == (
        b.key, b.images, list(b.programs), entries[1], arrays[1],
    )  # fmt: skip


def test_table_is_read_as_it_was_written(table, tmp_path):
    table.write(tmp_path / "t.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json", "t.json.safetensors"]
    assert same(read_table(tmp_path / "t.json"), table)
    first = (tmp_path / "t.json").read_bytes(), (tmp_path / "t.json.safetensors").read_bytes()
    read_table(tmp_path / "t.json").write(tmp_path / "u.json")
    assert ((tmp_path / "u.json").read_bytes(), (tmp_path / "u.json.safetensors").read_bytes()) == first


def test_a_tensor_is_a_line_that_a_person_can_read(table, tmp_path):
    table.write(tmp_path / "t.json")
    lines = (tmp_path / "t.json").read_text().splitlines()
    (line,) = [line for line in lines if '"a.conv2d"' in line]
    assert line.strip().startswith(
        '{"name": "a.conv2d", "class": "feature", "estimator": "mse", "affine": [0.1, -3]'
    )


def test_table_without_constants_is_one_file_and_takes_an_old_one_away(table, tmp_path):
    table.write(tmp_path / "t.json")
    CalibrationTable(table.key, table.images, table.programs).write(tmp_path / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    assert read_table(tmp_path / "t.json").constants == {}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("entry", {"histogram": {"low": 0, "high": 1, "step": 1, "first": 0, "counts": [-1]}}, "counts.0"),
        ("entry", {"histogram": {"low": 0, "high": 1, "step": 1, "first": 0, "counts": 3}}, "counts"),
        ("entry", {"class": "features"}, "class"),
        ("entry", {"symmetric": "0.2"}, "symmetric"),
        ("entry", {"affine": [0.1, 3.5]}, "affine.1"),
        ("entry", {"extra": 1}, "extra"),
        ("coverage", {"taken": None}, "taken"),
        ("head", {"key": 5}, "key"),
        ("head", {"images": ["a.png"]}, "images"),
    ],
)
def test_rows_of_another_type_are_refused_though_their_digests_fit(table, tmp_path, part, change, words):
    path = tmp_path / "t.json"
    table.write(path)
    values = json.loads(path.read_text())
    if part == "head":
        values.update(change)
    else:
        rows = values["coverage"] if part == "coverage" else next(iter(values["programs"].values()))
        rows[0] = sealed({k: v for k, v in (rows[0] | change).items() if k != "sha256"})
    with suppress(TypeError, AttributeError):  # where the change leaves no table to sum up
        values["sha256"] = _whole(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CalibrationError, match=rf"is damaged \(ValueError: [\w.]*{words}.*Calibrate again"):
        read_table(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"affine": [0.1, -3]', '"affine": [0.2, -3]', "the entry 'x' of program 'router' was edited"),
        (
            '"channels": [0.25, 0.1]',
            '"channels": [0.25, 0.2]',
            "the entry 'a.weight' of program 'wide' was edited",
        ),
        ('"format": 4', '"format": 3', "has format 3; this version reads 4"),
        ('"weights": "ab"', '"weights": "xy"', "its key, its images or its list of tensors was edited"),
        ('"programs"', '"programmes"', "is damaged .ValueError: programs: Field required"),
        ('"class": "feature", ', "", "was edited"),
        ("]\n }\n}\n", "]\n }\n", "is damaged .*Expecting"),
        ("0.25", "NaN", "the value NaN is not a number"),
    ],
)
def test_edited_or_damaged_table_is_refused_by_name(table, tmp_path, old, new, words):
    path = tmp_path / "t.json"
    table.write(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CalibrationError, match=f"{words}.*Calibrate again: edgedyn calibrate") as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 5


def test_table_without_one_of_its_tensors_is_refused(table, tmp_path):
    path = tmp_path / "t.json"
    table.write(path)
    lines = path.read_text().splitlines()
    (gone,) = [line for line in lines if '"name": "a.weight"' in line]
    path.write_text("\n".join(line for line in lines if line is not gone).replace("},\n  ]", "}\n  ]"))
    with pytest.raises(CalibrationError, match="its list of tensors was edited"):
        read_table(path)


def test_weights_of_somebody_else_under_the_same_name_are_left_alone(table, tmp_path):
    trained = tmp_path / "t.safetensors"
    trained.write_bytes(b"trained for days")
    table.write(tmp_path / "t.json")
    CalibrationTable(table.key, table.images, table.programs).write(tmp_path / "t.json")
    assert trained.read_bytes() == b"trained for days"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t.safetensors", r"is a JSON file, found .*t\.safetensors\. Give it a name that ends in \.json"),
        ("none/t.json", r"there is no folder .*none\. Make it first"),
    ],
)
def test_place_that_can_hold_no_table_is_refused(tmp_path, name, words):
    with pytest.raises(UsageError, match=words):
        refuse_place(tmp_path / name)


def test_missing_files_and_other_constants_are_refused(table, tmp_path):
    with pytest.raises(CalibrationError, match=r"none\.json cannot be read \(No such file"):
        read_table(tmp_path / "none.json")
    table.write(tmp_path / "t.json")
    beside = tmp_path / "t.json.safetensors"
    beside.write_bytes(beside.read_bytes()[:-1] + b"\1")
    with pytest.raises(
        CalibrationError, match=r"t\.json\.safetensors, the weights of .* has sha256 .* the table says"
    ):
        read_table(tmp_path / "t.json")
    beside.unlink()
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_table(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "ef"}, "is of another data: it was 'cd', now 'ef'"),
        ({"model": {"network": "net", "weights": "xy"}}, "of another model: weights was 'ab', now 'xy'"),
        ({"forms": {"op": "a"}}, "of other forms: op was None, now 'a'"),
        ({"more": 1}, "of another more: it was None, now 1"),
    ],
)
def test_table_of_something_else_names_the_field(table, tmp_path, change, words):
    path = tmp_path / "t.json"
    table.refuse_other(dict(KEY), path)
    with pytest.raises(CalibrationError, match=f"{words}.*or pass --force"):
        table.refuse_other({**KEY, **change}, path)


def test_key_survives_the_file(table, tmp_path):
    table.write(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["key"] == KEY
    read_table(tmp_path / "t.json").refuse_other(KEY, tmp_path / "t.json")
