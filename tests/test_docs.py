"""README and docs: every code block runs, every link leads somewhere, generated pages are fresh."""

from __future__ import annotations

import re
from pathlib import Path

import docs_hooks
import make_docs
import pytest
from doc_blocks import ROOT, Block, Reader, read_blocks

from edgedyn import quantize
from edgedyn.images.manifest import read_manifest
from edgedyn.recipe.describe import recipe_keys
from edgedyn.recipe.recipe import load_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "recipes/README.md"]
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
FILES = ("model.pte", "model.onnx", "model.engine", "model.decomposed")  # names of files, not keys
# text shows output, and the few lines of a table of folders
LANGUAGES = {"sh", "python", "yaml", "text", "cpp"}


def _parameter(block: Block):
    marks = []
    if reason := block.mark("skip"):
        marks.append(pytest.mark.skip(reason=reason))
    if block.mark("slow"):
        marks.append(pytest.mark.slow)
    return pytest.param(block, marks=marks, id=f"{block.page}:{block.line}")


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {page.name: Reader(tmp_path_factory.mktemp(page.stem)) for page in PAGES}


@pytest.mark.parametrize("block", [_parameter(b) for b in BLOCKS if b.language != "text"])
def test_block_runs_in_the_order_of_its_page(block, readers, monkeypatch):
    reader = readers[block.page]
    monkeypatch.chdir(reader.folder)
    monkeypatch.syspath_prepend(reader.folder)
    reader.follow(block)
    if block.language == "yaml":
        assert block.title, "a YAML block is a file; give it a title"
        written = reader.folder / block.title
        assert read_manifest(written).files if "files:" in block.code else load_recipe(written)


def test_every_block_has_a_language_and_every_mark_a_meaning():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    marks = [mark.split(" ")[0] for block in BLOCKS for mark in block.marks]
    assert set(marks) <= {"skip:", "slow:", "first:", "with", "replace"}
    reasons = [block.mark(name) for block in BLOCKS for name in ("skip", "slow")]
    assert "" not in reasons


_LINK = re.compile(r"\[[^\]]*\]\((?!https?://)(?P<file>[^)#]*)(?:#(?P<anchor>[^)]+))?\)")
_CODE = re.compile(r"^```.*?^```$|`[^`]*`", re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_to_files_and_headings(page):
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    for link in _LINK.finditer(text):
        file = page.parent / link["file"] if link["file"] else page
        assert file.exists(), link[0]
        assert link["anchor"] is None or link["anchor"] in _anchors(file), link[0]


def test_every_page_is_in_the_map_of_the_readme_and_in_the_navigation():
    readme, navigation = (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"(docs/{page.name}" in readme
        assert f": {page.name}\n" in navigation


@pytest.mark.parametrize("path", make_docs.generated_files(), ids=lambda path: path.name)
def test_generated_file_is_fresh(path):
    assert path.read_text(encoding="utf-8") == make_docs.generated_files()[path], (
        f"{path.name} is stale. Run: python tools/make_docs.py"
    )


def test_documented_keys_exist():
    """Dotted keys in code on any page: quantize.shift, and sections of keys: quantize.ranges."""
    keys = {key.key for key in recipe_keys()}
    known = (
        keys | {key.rpartition(".")[0] for key in keys} | {f"quantize.{name}" for name in quantize.__all__}
    )
    roots = {key.partition(".")[0] for key in keys if "." in key}
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"`(\w+\.[\w.]*\w)`", text) + re.findall(r"--set ([\w.]+)=", text)
        found += [name for name in names if name.partition(".")[0] in roots and not name.startswith(FILES)]
    assert len(found) > 10
    assert [name for name in found if name not in known and not name.startswith("model.arguments.")] == []


def test_the_block_reader_reads(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n<!-- test: with --set a=1 -->\n<!-- test: replace x => y -->\n```sh\nedgedyn x\n```\n\n"
        '```yaml title="a.yaml"\nk: 1\n```\n'
    )
    first, second = read_blocks(page)
    assert (first.language, first.line, first.text, first.mark("with")) == (
        "sh",
        5,
        "edgedyn y\n",
        "--set a=1",
    )
    assert (first.mark("skip"), second.title, second.code, second.marks) == (None, "a.yaml", "k: 1\n", ())


@pytest.mark.parametrize(
    ("language", "code"), [("sh", "false"), ("sh", "edgedyn list nothing"), ("python", "assert 0")]
)
def test_a_block_that_fails_is_a_failure(tmp_path, language, code):
    with pytest.raises(Exception):  # noqa: B017, PT011 - each fails in its own way
        Reader(tmp_path).follow(Block("page.md", 1, language, None, (), code + "\n"))


def test_examples_run_one_after_the_other(tmp_path):
    reader = Reader(tmp_path)
    reader.shell(
        f"python tools/make_noisy.py photo.png && python {ROOT}/examples/own_network.py photo.png -o own"
    )
    reader.shell(f"python {ROOT}/examples/use_bundle.py own | grep '(100, 130, 3) (100, 130, 3)'")
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"own_network", "use_bundle"}


def test_reference_has_a_page_per_room_and_per_file_at_the_root():
    rooms = docs_hooks.rooms()
    assert {"layers", "ops", "targets", "pipeline", "errors"} <= set(rooms)
    assert len(rooms) == len(set(rooms))
    assert not [room for room in rooms if room.startswith("_")]


@pytest.mark.parametrize(
    ("tag", "count"),
    [
        ('<script src="https://cdn.example/a.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/css">', 1),
        ('<link href="https://fonts.example" rel="preconnect">', 1),
        ('<img alt="" src=https://example/a.png>', 1),
        ("<style>@import url(https://example/a.css);</style>", 1),
        ('<a href="https://example">a link is no asset</a>', 0),
        ('<link rel="canonical" href="https://example/page">', 0),
        ('<script src="assets/a.js"></script><img src="../a.png">', 0),
    ],
)
def test_assets_of_other_hosts_are_found(tmp_path, tag, count):
    (tmp_path / "page.html").write_text(f"<html>{tag}</html>")
    assert len(docs_hooks.remote_assets(tmp_path)) == count
