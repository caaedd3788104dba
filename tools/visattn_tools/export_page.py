"""``model_cards/EXPORT.md``: every model in every format, and how far its file is from it."""

from collections.abc import Sequence
from pathlib import Path

from timm.models import model_entrypoint

import visattn

from .export_formats import FORMATS
from .results import FOLDER, Record, load

PAGE = FOLDER.parent / "EXPORT.md"
HEADER = """# Export

Written by `tools/make_tables.py` from `results/export.json`, which `tools/export_table.py` measures: every model is
written by `tools/export.py` with random weights, none of them constant, for batches of any size, and its file is run on
random images of the model's own size in batches of 1 and 3, neither of which was traced. A figure is the largest
difference from eager torch in float32, relative to the largest value of the output; up to {tolerance:g} passes. ONNX
files are run by onnxruntime on the CPU. *maps* are the feature maps of `features_only`, *sizes* files that take images
of any height and width that 32 divides, run on two other sizes.

"""
FOOT = """
`+n`: {explained}
"""
EXPLAINED = (
    "n images are not counted, and others were drawn where no image of a batch was left. Their error is beyond the "
    "tolerance, but at most ten times what noise of 3e-6 in its sums does to the model itself: it chooses between "
    "scores that are equal but for rounding."
)
WORDS = {"classes": "", "features": " maps", "sizes": " sizes"}


def _newest(records: Sequence[Record]) -> dict[tuple[str, str], Record]:
    """By model and bench the newest; of one day, one that passed."""
    order = sorted(records, key=lambda record: (record["date"], "failure" not in record))
    return {(record["model"], record["bench"]): record for record in order}


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if "failure" in record:
        return "fails"
    error = record["relative_error"]
    return (f"{error:.1e}" if error else "0") + (f" +{record['left_out']}" if record.get("left_out") else "")


def export_page(records: Sequence[Record]) -> str:
    """The page of these results."""
    newest = _newest(records)
    known = [f"{form} {variant}" for variant in WORDS for form in FORMATS]
    benches = [bench for bench in known if any(b == bench for _, b in newest)]
    titles = [f"{FORMATS[form].title}{WORDS[variant]}" for form, variant in (bench.split() for bench in benches)]
    text = HEADER.format(tolerance=max(record.get("tolerance", 0) for record in records))
    text += f"| model | {' | '.join(titles)} |\n|---|{'---:|' * len(titles)}\n"
    models = {name for name, _ in newest}
    names = [name for name in visattn.list_models() if name in models]
    for name in sorted(names, key=lambda n: (model_entrypoint(n).__module__, n)):
        text += f"| `{name}` | {' | '.join(_cell(newest.get((name, bench))) for bench in benches)} |\n"
    if any(record.get("left_out") for record in newest.values()):
        text += FOOT.format(explained=EXPLAINED)
    failures = [f"- `{name}`, {bench}: {r['failure']}" for (name, bench), r in sorted(newest.items()) if "failure" in r]
    if failures:
        text += "\nWhat fails:\n\n" + "\n".join(failures) + "\n"
    return text + "\nMeasured with:\n\n" + "\n".join(_measured(list(newest.values()))) + "\n"


def _measured(records: Sequence[Record]) -> list[str]:
    """A line per environment and day, with how many files it wrote."""
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    lines: dict[str, int] = {}
    for record in records:
        versions = ", ".join(f"{name} {record[name]}" for name in packages if name in record)
        line = f"{record['date']}, {record['hardware']}: {versions}"
        lines[line] = lines.get(line, 0) + 1
    return [f"- {line} ({count} files)" for line, count in sorted(lines.items())]


def export_pages() -> dict[Path, str]:
    """Path and content of the page; none before there are results."""
    records = load("export")
    return {PAGE: export_page(records)} if records else {}
