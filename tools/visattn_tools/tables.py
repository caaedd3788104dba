"""The model table of the README and the model cards, from measured and reported figures.

``tools/benchmark.py`` writes ``model_cards/results``; ``model_cards/reported.json`` holds what authors report, each
family with its source. Nothing else puts a figure into the README or a card.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cards import card
from .cli import Parser, UserError
from .files import write_text
from .results import measured as measured_figures

ROOT = Path(__file__).parents[2]
START, END = "<!-- models: written by tools/make_tables.py -->", "<!-- /models -->"


def _read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "model_cards" / name).read_text(encoding="utf-8"))


def model_table(families: dict[str, Any], measured: dict[str, Any]) -> str:
    """Markdown rows of all models of `families`.

    Raises:
        UserError: A model has not been measured.
    """
    lines = [
        "| model | parameters (M) | GMACs | at | top-1 % (reported) | source |",
        "|---|---:|---:|---|---:|---|",
    ]
    for family in families.values():
        for name, facts in family["models"].items():
            if name not in measured:
                raise UserError(
                    f"{name} is not in model_cards/results/count.json; run tools/benchmark.py {name} --output it"
                )
            figures = measured[name]["count"]
            side = "x".join(map(str, figures["input_size"][1:]))
            reported = facts.get("top1")
            source = facts.get("source", family["source"]) if reported else facts.get("note", "")
            lines.append(
                f"| `{name}` | {figures['params'] / 1e6:.2f} | {figures['gmacs']:.3f} | {side} "
                f"| {'' if reported is None else f'{reported:.1f}'} | {source} |"
            )
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Path and content of every page that holds figures."""
    families, measured = _read("reported.json"), measured_figures()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UserError(f"README.md has no place for the table: a line {START!r} and a line {END!r}")
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    out = {readme: f"{before}{START}\n{model_table(families, measured)}\n{END}{after}"}
    for key, family in families.items():
        out[ROOT / "model_cards" / f"{key}.md"] = card(key, family, measured, model_table({key: family}, measured))
    return out


def main(argv: Sequence[str] | None) -> None:
    """``tools/make_tables.py``: rewrite every page; with ``--check`` only say which ones are out of date.

    Raises:
        UserError: With ``--check``, pages that differ from what the figures say.
    """
    parser = Parser(prog="make_tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    args = parser.parse_args(argv)
    stale = [p for p, text in pages().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if args.check and stale:
        names = ", ".join(str(p.relative_to(ROOT)) for p in stale)
        raise UserError(f"out of date: {names}; run python tools/make_tables.py")
    for path in stale:
        write_text(path, pages()[path])
        print(f"wrote {path.relative_to(ROOT)}")
