"""Every problem of a section is named, each with its place."""

from __future__ import annotations

import math
import os
import tracemalloc
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from edgedyn.errors import RecipeError
from edgedyn.reading import TextError
from edgedyn.sections import Section, dump_yaml, explain, read_recipe, read_yaml


class Inner(Section):
    depth: int = 1


class Outer(Section):
    target: str
    precision: Literal["fp32", "int8"] = "fp32"
    inner: Inner = Inner()
    count: int = Field(default=1, ge=1)


def explained(**values: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer(**values)
    return explain(caught.value, Outer).splitlines()


def test_one_problem_is_one_line():
    assert explained() == ["the key 'target' is missing. Add it."]


def test_a_misspelt_key_is_named_though_another_is_missing():
    assert explained(targt="x") == [
        "2 problems",
        "  unknown key 'targt'; did you mean 'target'? Known here: target, precision, inner, count.",
        "  the key 'target' is missing. Add it.",
    ]


def test_all_problems_are_named_each_on_its_line():
    lines = explained(target=3, precision="int9", inner={"dept": 2}, count=0)
    assert lines[0] == "4 problems"
    assert lines[1] == "  unknown key 'inner.dept'; did you mean 'depth'? Known here: depth."
    assert lines[2].startswith("  target is 3: ")
    assert lines[3].startswith("  precision is 'int9': did you mean 'int8'? ")
    assert lines[4].startswith("  count is 0: ")
    assert len(lines) == 5


def test_yaml_of_values_reads_as_the_same_values():
    values = {"exact": 1e-12, "text": "1e-9", "name": "a"}
    assert read_yaml(dump_yaml(values)) == values


def refused(text: str) -> str:
    with pytest.raises(TextError) as caught:
        read_yaml(text)
    return str(caught.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def test_an_alias_bomb_takes_no_memory():
    assert len(BOMB) < 800
    tracemalloc.start()
    assert "repeats itself or too many values" in refused(BOMB)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_merge_keys_are_no_bomb_either():
    text = "a0: &a0 {k: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
    )
    assert "too many values" in refused(text)


def test_aliases_and_merge_keys_of_usual_size_are_read():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: {<<: [*a, {x: 7, z: 4}]}\n"
    a = {"x": 1, "y": 2}
    assert read_yaml(text) == {"a": a, "b": a, "c": {"x": 1, "y": 3}, "d": {"x": 1, "y": 2, "z": 4}}
    long = "a: &a [1, 2, 3]\nb: [" + "*a, " * 2000 + "]\n"
    assert len(read_yaml(long)["b"]) == 2000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' is there twice"),
        ("a: {b: 1, 'b': 2}\n", "line 1, column 11: the key 'b' is there twice"),
        ("a: &a [*a]\n", "line 1, column 8: the alias 'a' repeats itself"),
        ("a: *b\n", "line 1, column 4: found undefined alias 'b'"),
        ("a:\n" + "[" * 60, "more than 50 levels"),
        ("[" * 200_000, "more than 50 levels"),
        ("- " * 200_000, "more than 50 levels"),
        ("a: 2024-01-01\n", "line 1, column 4: '2024-01-01' is of type timestamp; put it in quotes"),
        ("a: 2024-99-99\n", "of type timestamp"),
        ("a: !!binary aGk=\n", "of type binary"),
        ("a: !!set {x, y}\n", "of type set"),
        ("a: !!omap [x: 1]\n", "of type omap"),
        ("a: !!python/object/apply:os.system [ls]\n", "os.system"),
        ("a: !!int x\n", "line 1, column 4: 'x' is no int"),
        ("a: !!int ''\n", "line 1, column 4: '' is no int"),
        ("a: !!bool perhaps\n", "line 1, column 4: 'perhaps' is no bool"),
        ("a: !!str [1]\n", "is of type str"),
        ("1: a\n", "line 1, column 1: the key 1 is not text"),
        ("on: a\n", "the key True is not text"),
        ("? [a]\n: b\n", "the key ['a'] is not text"),
        ("? {a: 1}\n: b\n", "is not text"),
        ("<<: 3\n", "<< of 3; expected keys and values"),
        (f"a: {'9' * 5000}\n", "a number of 5000 digits"),
        (f"a: 0x{'f' * 5000}\n", "a number of 5002 digits"),
        ("a: 1" + ":59" * 1000, "digits"),
        ('a: "x\\0y"\n', "line 1, column 4: the text holds the character '\\x00'"),
        ('a: "\\ud800"\n', "the text holds the character '\\ud800'"),
        ('a: "\\UFFFFFFFF"\n', "line 1"),
        ("a: 1\nb: \x1b[31m\n", "line 2: the character '\\x1b'"),
        ("a: [1\n", "line 2"),
        ("a: 1\n--- \nb: 2\n", "line 2, column 1: but found another document"),
        ("%YAML 9.9\n---\na: 1\n", "incompatible"),
        ("a: 1\n\tb: 2\n", "line 2"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_yaml_that_a_section_cannot_hold_is_refused_with_its_line(text, words):
    message = refused(text)
    assert words in message
    assert len(message) < 300


def test_a_long_value_is_cut_in_every_message():
    lines = explained(target="x", precision="y" * 10_000, inner={"z" * 10_000: list(range(10_000))})
    assert max(map(len, lines)) < 400


def test_a_thousand_problems_are_counted_and_twenty_are_shown():
    lines = explained(target="x", **{f"key{i}": i for i in range(1000)})
    assert lines[0] == "1000 problems"
    assert len(lines) == 22
    assert lines[-1] == "  and 980 more"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value):
    class Limit(Section):
        limit: float

    with pytest.raises(ValidationError, match="finite"):
        Limit(limit=value)


def test_a_file_of_sections_is_regular_and_small(tmp_path):
    path = tmp_path / "net.yaml"
    os.mkfifo(path)
    with pytest.raises(RecipeError, match=r"recipe .*net.yaml cannot be read \(not a regular file\)"):
        read_recipe(path, "recipe", "x")
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(RecipeError, match="8589934592 bytes; expected at most"):
        read_recipe(tmp_path / "big.yaml", "recipe", "x")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(
        RecipeError, match=r"twice.yaml is not YAML .* line 2, column 1: the key 'a' is there"
    ):
        read_recipe(tmp_path / "twice.yaml", "recipe", "x")
