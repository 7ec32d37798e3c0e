"""A wrong name is answered with the nearest known one."""

from __future__ import annotations

import pytest

from edgedyn import targets
from edgedyn.errors import EdgedynError, RecipeError, UsageError, nearest, printable, shown
from edgedyn.ops import choose_form, choose_forms, load_all
from edgedyn.recipe.networks import find_network


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("quantise", ["target", "quantize"], "did you mean 'quantize'? "),
        ("MALLENET", ["mallenet", "dncnn"], "did you mean 'mallenet'? "),
        ("conv3", ["body.conv1", "body.conv3"], "did you mean 'body.conv3'? "),
        ("zzz", ["target"], ""),
        ("x", [], ""),
    ],
)
def test_nearest_name_is_a_hint_or_nothing(name, known, hint):
    assert nearest(name, known) == hint


def refused_network() -> None:
    find_network("malenet")


def refused_target() -> None:
    targets.load("executorh")


def refused_form() -> None:
    op = load_all()["sliced_depthwise2d"]
    choose_form(op, targets.load("executorch"), "shift_mc")


def refused_op() -> None:
    import torch

    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    choose_forms(program, targets.load("executorch"), {"sliced_depthwise": "shift_mac"})


@pytest.mark.parametrize(
    ("refused", "hint"),
    [
        (refused_network, "did you mean 'mallenet'?"),
        (refused_target, "did you mean 'executorch'?"),
        (refused_form, "_shift_mac'?"),
        (refused_op, "did you mean 'sliced_depthwise2d'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_misspelt_name_is_refused_with_the_nearest(refused, hint):
    with pytest.raises(RecipeError) as caught:
        refused()
    assert hint in str(caught.value)


def test_every_exit_code_stands_in_the_table_of_the_module():
    from edgedyn import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, EdgedynError)]
    assert len(kinds) > 8
    for kind in kinds:
        assert f"\n    {kind.exit_code}    " in errors.__doc__


@pytest.mark.parametrize(
    "code", [0, 0x1B, 0x9B, 0xAD, 0x61C, 0x180E, 0x200D, 0x202E, 0x2060, 0x206F, 0xE0041]
)
def test_no_invisible_character_is_printed(code):
    assert not any(c != "\\" and not c.isalnum() for c in printable(chr(code)))
    assert printable("\u00e9 \u4e2d\t\n\u0634 \U0001f600") == "\u00e9 \u4e2d\t\n\u0634 \U0001f600"


def test_a_message_is_safe_to_print_and_its_next_step_survives_a_long_value():
    error = UsageError(
        "cannot write \x1b[31m\x9b\u202e\udcff" + "x" * 10_000 + ". Choose another place.\nSecond\tline"
    )
    lines = str(error).split("\n")
    assert lines[0].startswith("cannot write \\x1b[31m\\x9b\\u202e\\udcffxxx")
    assert lines[0].endswith("xxx. Choose another place.")
    assert len(lines[0]) < 2100
    assert lines[1] == "Second\tline"


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, list(range(10**6)), {"a": ["b" * 10**6]}, 10**9000, [[[[[[[[1]]]]]]]], b"z" * 10**5],
    ids=lambda value: type(value).__name__,
)
def test_a_quoted_value_is_short(value):
    assert len(shown(value)) <= 80


def test_a_short_value_is_quoted_as_it_is():
    assert shown([1, 3, "a"]) == "[1, 3, 'a']"
    assert shown({"width": 4}) == "{'width': 4}"


def test_the_nearest_name_of_a_book_is_found_at_once():
    assert nearest("x" * 10**6, ["a", "b"]) == ""
