"""Files are whole or as they were."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from edgedyn.errors import UsageError
from edgedyn.files import replace_file, to_json


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.engine"
    replace_file(path, b"first")
    with pytest.raises(TypeError):
        replace_file(path, object())
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"


def test_replacing_a_file_that_cannot_be_written_is_refused_and_leaves_no_part(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        replace_file(tmp_path / "folder", b"data")
    assert os.listdir(tmp_path) == ["folder"]


def test_json_holds_nothing_that_a_strict_parser_refuses():
    values = {"rows": [{"value": math.inf}, (math.nan, -math.inf)], "path": Path("out"), "median": 1.5}
    text = to_json(values)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"rows": [{"value": "inf"}, ["nan", "-inf"]], "path": "out", "median": 1.5}
