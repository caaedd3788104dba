"""Every page and table that shows figures, from the files that hold them: ``tools/make_tables.py``.

``tools/benchmark.py`` writes ``model_cards/results``, the scripts of ``kernels/benchmarks`` its ``results``;
``model_cards/reported.json`` holds what authors report, each family with its source. Nothing else puts a figure into
these pages.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import digits_table, kernel_tables, scaling
from .cards import card
from .cli import Parser, UserError
from .export_page import export_pages
from .files import write_text
from .model_tables import main_table, page
from .results import measured as measured_figures

ROOT = Path(__file__).parents[2]


def fill(path: Path, blocks: dict[str, str]) -> str:
    """The text of a page with its blocks renewed.

    Args:
        path: The page.
        blocks: By name the text between the lines ``<!-- NAME: written by tools/make_tables.py -->`` and
            ``<!-- /NAME -->``.

    Raises:
        UserError: The page has no place for a block, or one for a block that there is not.
    """
    text, written = path.read_text(encoding="utf-8"), ": written by tools/make_tables.py -->"
    for name, block in blocks.items():
        start, end = f"<!-- {name}{written}\n", f"<!-- /{name} -->"
        if start not in text or end not in text.split(start, 1)[1]:
            raise UserError(f"{path.name} has no place for {name}: a line {start.strip()!r} and a line {end!r}")
        before, rest = text.split(start, 1)
        text = f"{before}{start}{block}\n{end}{rest.split(end, 1)[1]}"
    places = [line.split(written)[0].removeprefix("<!-- ") for line in text.splitlines() if line.endswith(written)]
    if unknown := [name for name in places if name not in blocks]:
        raise UserError(f"{path.name} has a place for {', '.join(unknown)}, of which there are no figures")
    return text


def pages() -> dict[Path, str]:
    """Path and content of every page that holds figures."""
    families: dict[str, dict[str, Any]] = json.loads((ROOT / "model_cards/reported.json").read_text(encoding="utf-8"))
    measured = measured_figures()
    readme, kernels = ROOT / "README.md", ROOT / "kernels" / "README.md"
    out = {
        readme: fill(readme, {"models": main_table(families, measured), "kernels": kernel_tables.summary()}),
        kernels: fill(kernels, kernel_tables.blocks()),
        ROOT / "model_cards" / "README.md": page(families, measured),
        digits_table.RECIPES / "README.md": digits_table.page(digits_table.read_results()),
    }
    for key, family in families.items():
        out[ROOT / "model_cards" / f"{key}.md"] = card(key, family, measured)
    path, text = scaling.page()
    return out | {path: text} | export_pages()


def main(argv: Sequence[str] | None) -> None:
    """``tools/make_tables.py``: rewrite every page; with ``--check`` only say which ones are out of date.

    Raises:
        UserError: With ``--check``, pages that differ from what the figures say.
    """
    parser = Parser(prog="make_tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    args = parser.parse(argv)
    made = pages()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if args.check:
        if found := [str(path.relative_to(ROOT)) for path in stale]:
            raise UserError(f"out of date: {', '.join(found)}; run python tools/make_tables.py")
        return
    for path in stale:
        write_text(path, made[path])
        print(f"wrote {path.relative_to(ROOT)}")
