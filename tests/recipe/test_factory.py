"""Networks that cannot be made: the refusal quotes the user's line, in build and in inspect."""

from __future__ import annotations

import sys

import pytest
import strangers
import torch

from edgedyn.conversion.inspection import inspect
from edgedyn.errors import EdgedynError, ModelError, RecipeError
from edgedyn.recipe.factory import import_factory, make_network
from edgedyn.recipe.recipe import Recipe

LINE = r"\(at .*strangers\.py:\d+: "
CASES = {
    "raises": (ModelError, rf"RuntimeError: my config is missing {LINE}raise RuntimeError"),
    "not_a_module": (ModelError, r"is int, expected torch\.nn\.Module"),
    "exits": (ModelError, rf"SystemExit: 2 {LINE}sys\.exit\(2\)\)"),
    "opens_a_file": (ModelError, rf"JSONDecodeError: Expecting .* {LINE}return json\.loads"),
    "made": (ModelError, r"is Identity; expected a function or class"),
    "C": (ModelError, r"is int; expected a function or class"),
    "needs_a_width": (RecipeError, r"missing a required argument: 'width'; expected \(width: 'int'\)"),
    "nowhere": (RecipeError, r"has no attribute 'nowhere'"),
}


def recipe(network: str) -> Recipe:
    return Recipe(
        name="small",
        model={"network": network},
        input={"shape": [1, 3, 64, 64]},
        target="executorch",
        precision="fp32",
        validation="none",
    )


@pytest.mark.parametrize("name", CASES)
def test_network_that_cannot_be_made_is_refused_with_the_line(name):
    kind, message = CASES[name]
    for call in (lambda n: recipe(n).load_model(trust=True), lambda n: inspect(n, trust=True)):
        with pytest.raises(EdgedynError, match=message) as caught:
            call(f"strangers:{name}")
        assert type(caught.value) is kind
        assert f"strangers:{name}" in str(caught.value)


def test_interrupt_passes():
    with pytest.raises(KeyboardInterrupt):
        inspect("strangers:interrupted")


def test_network_that_raises_when_it_is_called_is_refused_with_the_line():
    with pytest.raises(ModelError, match=rf"KeyError: 'sigma' {LINE}raise KeyError"):
        inspect("strangers:raises_later", shape=(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(:\n", r"SyntaxError: invalid syntax \(at .*broken\.py:1: def make\(:\)"),
        (
            "import os\nos.environ['NO_SUCH_KEY']\n",
            r"KeyError: 'NO_SUCH_KEY' \(at .*broken\.py:2: os\.environ",
        ),
        ("import no_such_package_at_all\n", r"ModuleNotFoundError: .* \(at .*broken\.py:1: import no_such"),
        ("raise SystemExit('no GPU')\n", r"SystemExit: no GPU \(at .*broken\.py:1"),
        ("int.no_such_attribute\n", r"AttributeError: .* \(at .*broken\.py:1: int\.no"),
    ],
    ids=["syntax", "key", "package", "exit", "attribute"],
)
def test_module_that_cannot_be_imported_is_refused_with_the_line(tmp_path, monkeypatch, source, message):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=message):
        inspect("broken:make")


def test_class_without_a_signature_is_called():
    assert isinstance(make_network(torch.nn.Identity, "torch.nn:Identity", {}), torch.nn.Identity)
    with pytest.raises(ModelError, match="returned a value that is int"):
        make_network(int, "builtins:int", {})
    assert isinstance(strangers.made, torch.nn.Module)


def test_the_main_function_of_a_package_does_not_see_the_command_line(tmp_path, monkeypatch):
    """``edgedyn build x.yaml`` made torchrun start a file ``build`` of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").write_text("open('started', 'w')")
    words = ["edgedyn", "build", "x.yaml"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(ModelError, match=r"run:main' cannot be made: SystemExit: 2"):
        recipe("torch.distributed.run:main").load_model()
    assert not (tmp_path / "started").exists()
    assert sys.argv is words


def test_a_module_does_not_see_the_command_line_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "reads_words.py").write_text("import sys\nassert len(sys.argv) == 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["edgedyn", "build"])
    assert import_factory("reads_words").sys is sys
