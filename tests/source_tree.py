"""Reads the project's Python files without importing them: which module imports which, and what is public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Where each import package lies below the root of the project.
PACKAGES = {
    "visattn": "visattn",
    "visattn_kernels": "kernels/visattn_kernels",
    "visattn_tools": "tools/visattn_tools",
}


class Import(NamedTuple):
    """One import: the line it stands on, and the dotted module it reaches."""

    line: int
    module: str


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file of every module of our packages below `root`."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def scripts(root: Path) -> list[Path]:
    """The Python files that are run, not imported: tools, benchmarks and configs."""
    return sorted([*(root / "tools").glob("*.py"), *(root / "kernels/benchmarks").glob("*.py")]) + sorted(
        (root / "configs").rglob("*.py")
    )


def imports(path: Path, module: str, known: dict[str, Path]) -> Iterator[Import]:
    """Every import statement of a file, also those inside functions, with relative names resolved.

    Args:
        path: The file.
        module: Its dotted name; "" for a script.
        known: All modules of the project: ``from x import y`` reaches ``x.y`` where that is one of them, else ``x``.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(node.lineno, inner if inner in known else base)


def is_inside(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies in it."""
    return module == package or module.startswith(f"{package}.")
