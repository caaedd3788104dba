"""Tables of the models: what was counted and measured of them, beside what their authors report."""

from collections.abc import Sequence
from typing import Any

from .cli import UserError
from .results import Record, load

Families = dict[str, dict[str, Any]]
Figures = dict[str, dict[str, Record]]


def counted(name: str, measured: Figures) -> Record:
    """Parameters, MACs and activations of a model.

    Raises:
        UserError: They are not there.
    """
    if "count" not in measured.get(name, {}):
        raise UserError(
            f"{name} is not in model_cards/results/count.json; run tools/benchmark.py {name} --peer auto --output it"
        )
    return measured[name]["count"]


def _side(record: Record) -> str:
    return "x".join(map(str, record["input_size"][1:]))


def _top1(facts: dict[str, Any]) -> str:
    return f"{facts['top1']:.1f}" if "top1" in facts else ""


def _source(family: dict[str, Any], facts: dict[str, Any]) -> str:
    return facts.get("source", family["source"]) if "top1" in facts else facts.get("note", "")


def model_table(family: dict[str, Any], measured: Figures) -> str:
    """Markdown rows of the models of a family.

    Raises:
        UserError: A model has not been counted.
    """
    lines = [
        "| model | parameters (M) | GMACs | activations (M) | at | top-1 % (reported) | source |",
        "|---|---:|---:|---:|---|---:|---|",
    ]
    for name, facts in family["models"].items():
        f = counted(name, measured)
        lines.append(
            f"| `{name}` | {f['params'] / 1e6:.2f} | {f['gmacs']:.3f} | {f['activations_m']:.2f} | {_side(f)} "
            f"| {_top1(facts)} | {_source(family, facts)} |"
        )
    return "\n".join(lines)


def _beside(record: Record | None) -> list[str]:
    """Images per second, the peer, its images per second, the ratio; blank where not measured."""
    if record is None:
        return [""] * 4
    speed = f"{record['images_per_second']:,.0f}"
    if "peer" not in record:
        return [speed, "", "", ""]
    return [speed, f"`{record['peer']}`", f"{record['peer_images_per_second']:,.0f}", f"{record['ratio_to_peer']:.2f}x"]


def runs(records: Sequence[Record]) -> str:
    """Hardware, way of computing, versions and date, of every run once."""
    found = [
        ", ".join(
            [record["hardware"], record["dtype"]]
            + (["channels last"] if record["channels_last"] else [])
            + [f"compiled by {record['compiled']}" if record["compiled"] else "eager"]
            + [f"{key} {record[key]}" for key in ("torch", "triton", "timm") if key in record]
            + [record["date"]]
        )
        for record in records
    ]
    return "; ".join(dict.fromkeys(found))


def main_table(families: Families, measured: Figures) -> str:
    """The main variants of all families, for the README, and what their figures are."""
    lines = [
        "| model | parameters (M) | GMACs | px | top-1 % (reported) | images/s | timm's nearest | images/s | ratio |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    sources, records = [], []
    for key, family in families.items():
        for name in family["main"]:
            facts, figures, speed = family["models"][name], counted(name, measured), measured[name].get("inference")
            cells = [f"[`{name}`](model_cards/{key}.md)", f"{figures['params'] / 1e6:.1f}", f"{figures['gmacs']:.2f}"]
            cells += [str(figures["input_size"][-1]), _top1(facts), *_beside(speed)]
            lines.append(f"| {' | '.join(cells)} |")
            records += [speed] if speed else []
        reported = [name for name in family["main"] if "top1" in family["models"][name]]
        named = dict.fromkeys(_source(family, family["models"][name]) for name in reported)
        sources += [f"{family['title']}: {', '.join(named)}"] if named else []
    text = f"Top-1 on ImageNet-1k as reported by others, not measured here. {'. '.join(sources)}."
    if records:
        text += f" Images/s of inference, model and peer in turns in one run: {runs(records)}."
    return "\n".join([*lines, "", text])


def page(families: Families, measured: Figures) -> str:
    """``model_cards/README.md``: every variant."""
    parts = [
        """# All models

Parameters, MACs and activations are counted by `tools/benchmark.py`: GMACs are half the FLOPs of convolutions and
matrix products for one image, activations what these put out. Top-1 is ImageNet-1k accuracy as reported by the
source, not measured here; why there is none stands in its place. Speeds are medians of images per second, model and
peer in turns in one run. The peer is the same architecture in timm where it has one, else a plain model of timm of
nearly equal MACs at the same image size, whose own GMACs stand beside it. Written by `python tools/make_tables.py`
from `results/`."""
    ]
    for bench in ("inference", "training"):
        records = [figures[bench] for figures in measured.values() if bench in figures]
        if records:
            parts.append(f"{bench.capitalize()}: {runs(records)}.")
    for key, family in families.items():
        parts.append(f"## [{family['title']}]({key}.md)")
        parts.append(model_table(family, measured))
        if speeds := speed_table(list(family["models"]), measured):
            parts.append(speeds)
    if backends := _backends(load("backends")):
        parts.append(backends)
    return "\n\n".join(parts) + "\n"


def speed_table(names: list[str], measured: Figures) -> str:
    """Images per second of a family; empty if nothing was measured."""
    rows = []
    for name in names:
        inference, training = (measured[name].get(bench) for bench in ("inference", "training"))
        if not (inference or training):
            continue
        count = measured[name]["count"]
        peer = (inference or training or {}).get("peer")
        macs = f"{count['peer_gmacs']:.3f}" if peer and count.get("peer") == peer else ""
        cells = [f"`{name}`", *_beside(inference), str(inference["batch_size"]) if inference else "", macs]
        speed, _, theirs, ratio = _beside(training)
        cells += [speed, theirs, ratio, str(training["batch_size"]) if training else ""]
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        "| model | inference, images/s | peer | its images/s | ratio | batch | its GMACs | training, images/s "
        "| peer's | ratio | batch |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *rows]) if rows else ""


def _backends(records: list[Record]) -> str:
    """Backends beside each other; empty if nothing was measured."""
    names = list(dict.fromkeys(record["backend"] for record in records))
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(record["model"], {})[record["backend"]] = record
    several = {model: row for model, row in rows.items() if len(row) > 1}
    if not several:
        return ""
    lines = [f"| model | batch | {' | '.join(f'`{name}`' for name in names)} |", "|---|---:|" + "---:|" * len(names)]
    for model, row in several.items():
        cells = [f"{row[name]['images_per_second']:,.0f}" if name in row else "" for name in names]
        batch = ", ".join(dict.fromkeys(str(record["batch_size"]) for record in row.values()))
        lines.append(f"| `{model}` | {batch} | {' | '.join(cells)} |")
    about = f"Images per second of inference by backend of the operators, in turns in one run: {runs(records)}. "
    about += "Blank: an operator of the model has no such kernel."
    return "\n\n".join(["## Backends", about, "\n".join(lines)])
