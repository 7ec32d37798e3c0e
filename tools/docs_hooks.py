"""Hooks of mkdocs: one page of API reference per room, and no page that loads anything from the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "edgedyn"
_REMOTE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon)\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon)\b[^>]*>"
    r"|@import\s+[^;]*//[^;]*;|url\([\"']?https?://[^)]*\)"
)


def rooms() -> list[str]:
    """Return the modules that have a page: the folders of the package, then the files at its root."""
    folders = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    files = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    return [*folders, *files]


def on_config(config: Any) -> Any:
    """Put the pages of the reference at the end of the navigation."""
    config.nav.append({"API": [{f"edgedyn.{name}": f"api/{name}.md"} for name in rooms()]})
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages; each shows its module and the modules in it."""
    from mkdocs.structure.files import File

    for name in rooms():
        page = f"# edgedyn.{name}\n\n::: edgedyn.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=page))
    return files


def on_post_build(config: Any) -> None:
    """Refuse a site with remote assets."""
    from mkdocs.exceptions import PluginError

    if found := remote_assets(Path(config.site_dir)):
        raise PluginError("pages load from the network; expected local files only:\n" + "\n".join(found[:10]))


def remote_assets(site: Path) -> list[str]:
    """Return every script, style, font or picture that a page of a site loads from another host."""
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    return [
        f"{page.relative_to(site)}: {tag[0][:120]}" for page in pages for tag in _REMOTE.finditer(texts[page])
    ]
