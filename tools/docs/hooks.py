"""Brings the project's own pages into the site, at the places where they lie, and makes those of the API.

A page keeps its path, so its links to other pages hold; what else it links to, such as a recipe, becomes a file of the
site, and a linked folder a page that lists it.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def _modules(folder: str, pattern: str = "[a-z]*.py") -> list[str]:
    """Dotted names of the modules of a package that match a pattern; a package stands for its ``__init__.py``."""
    paths = sorted((ROOT / folder).glob(pattern))
    names = [path.parent if path.name == "__init__.py" else path.with_suffix("") for path in paths]
    return [".".join(name.relative_to(ROOT).parts).removeprefix("kernels.") for name in names]


FOLDERS = ("model_cards", "kernels", "configs")
"""Where pages lie, besides the root."""
TOOLS = ("training", "validation", "prediction", "model_files", "checkpoint", "conversion", "averaging", "export")
TOOLS += ("visualization", "benchmark", "hub", "augment", "mm")
API = {
    "Models": ["visattn", "visattn.models._pyramid", "visattn.models._tokens", *_modules("visattn/models")],
    "Layers": _modules("visattn/layers"),
    "Operators": ["visattn_kernels.backend", *_modules("kernels/visattn_kernels", "*/__init__.py")],
    "Tools": [f"visattn_tools.{name}" for name in TOOLS],
}
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
"""A link of Markdown: what stands before, its target, an anchor and the end."""


def _pages() -> list[Path]:
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return top + [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Order the pages."""

    def under(folder: str) -> list[str]:
        return [path.relative_to(ROOT).as_posix() for path in _pages() if path.is_relative_to(ROOT / folder)]

    config.nav = [
        {"visattn": "README.md"},
        {"Model cards": under("model_cards")},
        {"Operators": under("kernels")},
        {"Recipes": under("configs")},
        {"API": [{title: [f"api/{module}.md" for module in modules]} for title, modules in API.items()]},
        {"Contributing": "CONTRIBUTING.md"},
        {"Changelog": "CHANGELOG.md"},
    ]
    return config


def _targets(page: Path) -> Iterator[str]:
    """Files and folders of the project that a page links to, from the root."""
    for _, target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if ":" not in target:
            yield posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), target))


def _listing(folder: str) -> str:
    names = sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file())
    return f"# {folder}\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and what they link to."""

    def add(path: str, content: str | None = None) -> None:
        if files.get_file_from_path(path) is None:
            source = {"content": content} if content is not None else {"abs_src_path": str(ROOT / path)}
            files.append(File.generated(config, path, **source))

    pages = _pages()
    for page in pages:
        add(page.relative_to(ROOT).as_posix())
    for target in sorted({target for page in pages for target in _targets(page)}):
        if (ROOT / target).is_dir():
            if not (ROOT / target / "README.md").exists():
                add(f"{target}/README.md", _listing(target))
                for path in (ROOT / target).iterdir():
                    if path.is_file():
                        add(path.relative_to(ROOT).as_posix())
        elif (ROOT / target).is_file():
            add(target)
    for module in (module for modules in API.values() for module in modules):
        add(f"api/{module}.md", f"# {module}\n\n::: {module}\n")
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to folders lead to their pages; the front matter of cards is no part of the text."""
    here = posixpath.dirname(page.file.src_uri)

    def resolve(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        is_folder = ":" not in target and os.path.isdir(ROOT / here / target)
        return f"{before}{target}/README.md{after}" if is_folder else link[0]

    return LINK.sub(resolve, markdown)
