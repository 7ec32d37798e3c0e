"""Networks outside edgedyn: found where the rule of trust allows it, and nothing runs where it does not."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from edgedyn.errors import ModelError, RecipeError
from edgedyn.recipe.networks import find_network
from edgedyn.recipe.recipe import load_recipe

OWN = """from functools import partial
from os import system
from torch import nn

def make(width=3):
    return nn.Conv2d(3, width, 1)

def _hidden():
    return make()

instance = partial(make)
"""
CANARY = "from pathlib import Path\nPath({place!r}).touch()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the user's own module, not on the path, and an installed package."""
    here, installed = tmp_path / "here", tmp_path / "installed"
    for place in (here, installed / "zoo"):
        place.mkdir(parents=True)
    (here / "own_net.py").write_text(OWN)
    (installed / "zoo" / "__init__.py").write_text("from zoo.nets import make\nfrom zoo._private import hide")
    (installed / "zoo" / "nets.py").write_text(f"{OWN}\nclass Net(nn.Module):\n    pass\n")
    (installed / "zoo" / "_private.py").write_text("def hide(): pass\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(installed), *(x for x in sys.path if x)])
    yield here
    for name in [name for name in sys.modules if name.partition(".")[0] in ("own_net", "zoo", "evil")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dncnn", {"pretrained": "any text"}),
        ("own_net:make", {"width": "text.is/fine"}),
        ("zoo.nets:make", {"width": 3, "sizes": [1, 2.5, None, True]}),
        ("zoo:make", {}),
        ("zoo.nets:Net", {"kind": "mul"}),
        ("torch.nn:Identity", {}),
    ],
)
def test_networks_that_the_user_names_are_found(folder, name, arguments):
    assert callable(find_network(name, arguments, folder=folder))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("os:system", {"command": "touch ran"}, "standard library"),
        ("subprocess:run", {}, "standard library"),
        ("posix:system", {}, "standard library"),
        ("builtins:exec", {}, "standard library"),
        ("pickle:load", {}, "standard library"),
        ("own_net:system", {}, "builtin_function_or_method of posix"),
        ("own_net:instance", {}, "a partial of functools"),
        ("own_net:partial", {}, "a type of functools"),
        ("own_net:_hidden", {}, "public"),
        ("own_net:make.__globals__", {}, "public"),
        ("_own_net:make", {}, "public"),
        ("zoo._private:hide", {}, "public"),
        ("zoo:hide", {}, "of zoo._private"),
        ("zoo.nets:make", {"width": "own_net.py"}, "'own_net.py'; an installed package gets numbers"),
        ("zoo.nets:make", {"width": "reboot"}, "'reboot'; an installed package gets numbers"),
        ("zoo.nets:make", {"width": [1, {"a": "x"}]}, "gets numbers"),
        ("zoo.nets:Net", {"kind": "own_net.py"}, "numbers and plain words"),
        ("zoo.nets:Net", {"kind": "a/b"}, "numbers and plain words"),
        ("zoo.nets:Net", {"kind": "file"}, "numbers and plain words"),
        ("torch.serialization:load", {"f": "evil.pth", "weights_only": False}, "'evil.pth'"),
        ("torch:load", {"f": "evil.pth", "weights_only": False}, "'evil.pth'"),
        ("torch.hub:load", {"repo_or_dir": "owner/evil", "model": "x"}, "'owner/evil'"),
        ("numpy:load", {"file": "file", "allow_pickle": True}, "'file'"),
        ("yaml:unsafe_load", {"stream": "!!python/object/apply:os.system [touch ran]"}, "numbers"),
        ("edgedyn.files:replace_file", {"path": "x", "data": "y"}, "numbers"),
        ("edgedyn.errors:EdgedynError", {}, "a class of edgedyn that is no torch.nn.Module"),
    ],
)
def test_networks_that_only_a_recipe_would_name_are_refused_and_nothing_runs(folder, name, arguments, words):
    (folder / "file").touch()
    with pytest.raises(RecipeError, match="not trusted") as caught:
        find_network(name, arguments, folder=folder)
    assert words in str(caught.value)
    assert "--trust" in str(caught.value)
    assert not (folder / "ran").exists()


def test_trust_finds_any_function(folder):
    for name in ("os:getcwd", "zoo._private:hide", "own_net:_hidden"):
        assert callable(find_network(name, {"a": "b/c"}, folder=folder, trust=True))


@pytest.mark.parametrize("name", ["own_net:make", "zoo.nets:make", "torch.nn:Identity", "evil:make"])
def test_a_recipe_in_a_bundle_names_only_networks_of_edgedyn(folder, name):
    (folder / "evil.py").write_text(CANARY.format(place="ran"))
    (folder / "bundle").mkdir()
    (folder / "bundle" / "manifest.json").write_text('{"files": {"recipe.yaml": {}}}')
    for stranger in ({"folder": folder / "bundle"}, {"is_named": False}):
        assert find_network("dncnn", **stranger)
        with pytest.raises(RecipeError, match="only a network of edgedyn is trusted"):
            find_network(name, **stranger)
    assert not (folder / "ran").exists()
    assert str(folder) not in sys.path


def test_the_working_directory_is_on_the_path_only_where_a_network_lies_there(folder):
    find_network("zoo:make")
    with pytest.raises(RecipeError, match="No module named 'nowhere'"):
        find_network("nowhere:make")
    assert str(folder) not in sys.path
    find_network("own_net:make")
    assert sys.path[-1] == str(folder)


def test_a_module_that_fails_to_import_is_refused_with_its_own_words(folder):
    (folder / "evil.py").write_text("1 / 0")
    with pytest.raises(ModelError, match=r"ZeroDivisionError: division by zero"):
        find_network("evil:make")


def test_a_function_that_returns_no_network_is_refused(folder):
    (folder / "evil.py").write_text("def make(): return 3\n")
    (folder / "r.yaml").write_text(
        "model: {network: 'evil:make'}\ninput: {shape: [1, 3, 64, 64]}\ntarget: onnxruntime\n"
        "precision: fp32\nvalidation: x\n"
    )
    with pytest.raises(ModelError, match=r"a value that is int, expected torch\.nn\.Module"):
        load_recipe("r.yaml").load_model()
    found = load_recipe("r.yaml", ["model.network=own_net:make"]).load_model()
    assert isinstance(found, nn.Conv2d)


def test_a_manifest_of_something_else_makes_no_bundle(folder):
    for text in ("", "[]", '{"files": {"other.yaml": {}}}', '{"name": "a web app"}'):
        (folder / "manifest.json").write_text(text)
        assert find_network("own_net:make", folder=folder)
