"""Every problem of a section is named, each with its place."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from edgedyn.sections import Section, dump_yaml, explain, read_yaml


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
