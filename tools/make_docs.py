"""Write the generated files of the documentation.

    docs/recipe.md               every key of a recipe, from the descriptions in edgedyn/recipe/keys.py
    recipes/recipe.schema.json   the same as a JSON schema, for editors
    recipes/README.md            the recipes by network, with their measured numbers
    docs/extending.md            its code blocks, from the files of tests/extension/ that their titles name

python tools/make_docs.py [--check]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import recipe_tables
import typer

from edgedyn.recipe.describe import Key, recipe_keys, recipe_schema

ROOT = Path(__file__).parents[1]
_HEAD = """# Recipe keys

<!-- written by tools/make_docs.py from the descriptions in the package; do not edit -->

A **recipe** is a YAML file: network, weights, images, target, precision and limits. Every key can be set on
the command line, `--set quantize.rounding=nearest`. Paths in the file are relative to it; paths on the
command line start at the working directory. `edgedyn list keys` prints this page. Editors complete keys by
the schema `recipes/recipe.schema.json`.
"""
_BLOCK = re.compile(
    r'^```python title="mine/(?P<file>[\w./]+)"\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL
)


def generated_files() -> dict[Path, str]:
    """Return the text of every generated file."""
    extending = ROOT / "docs/extending.md"
    return {
        ROOT / "docs/recipe.md": recipe_page(recipe_keys()),
        ROOT / "recipes/recipe.schema.json": json.dumps(recipe_schema(), indent=1) + "\n",
        ROOT / "recipes/README.md": recipe_tables.recipes_page(),
        extending: fill_blocks(extending.read_text(encoding="utf-8"), ROOT / "tests/extension"),
    }


def recipe_page(keys: list[Key]) -> str:
    """Return docs/recipe.md: one table per section of the recipe."""
    sections: dict[str, list[Key]] = {"": []}
    for key in keys:
        sections.setdefault(key.key.rpartition(".")[0], []).append(key)
    page = [_HEAD]
    for section, rows in sections.items():
        page.append(f"\n## {_code(section) if section else 'The recipe itself'}\n")
        page.append("| key | type | default | meaning |\n|---|---|---|---|")
        for key in rows:
            meaning = key.meaning.replace("|", "\\|")
            page.append(f"| {_code(key.key)} | {_code(key.kind)} | {_code(key.default)} | {meaning} |")
    return "\n".join(page) + "\n"


def _code(text: str) -> str:
    """Return text as code in a table, where a bar ends a cell."""
    return "`" + text.replace("|", "\\|") + "`"


def fill_blocks(page: str, folder: Path) -> str:
    """Return a page whose Python blocks titled ``mine/FILE`` hold the files of a folder."""

    def fill(block: re.Match[str]) -> str:
        code = (folder / block["file"]).read_text(encoding="utf-8")
        return f'```python title="mine/{block["file"]}"\n{code}```'

    return _BLOCK.sub(fill, page)


def main(
    check: Annotated[bool, typer.Option(help="write nothing; exit 1 where a file is stale")] = False,
) -> None:
    """Write every generated file, or name the stale ones."""
    stale = [
        path for path, text in generated_files().items() if not path.exists() or path.read_text() != text
    ]
    for path in stale:
        typer.echo(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(generated_files()[path], encoding="utf-8")
    if check and stale:
        typer.echo("Run: python tools/make_docs.py")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
