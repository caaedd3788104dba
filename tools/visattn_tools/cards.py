"""Model cards, one a family: what a reader and the Hugging Face hub need to know.

Their figures come from the results files, from ``reported.json``, from the ``metafile.yml`` files of the
dense-prediction configs and from the recipes in ``configs/imagenet``; nothing else puts a figure into a card.
"""

import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import timm
import yaml

import visattn  # noqa: F401  registers the models

from .config import read_settings
from .front_matter import front_matter, reported_results
from .model_tables import model_table, runs, speed_table

CONFIGS = Path(__file__).parents[2] / "configs"


def card(key: str, family: dict[str, Any], measured: dict[str, Any]) -> str:
    """The model card of one family, in the layout of the Hugging Face hub.

    Args:
        key: Its name in ``model_cards/reported.json``.
        family: Its entry there.
        measured: Figures of our own, by model.
    """
    names = list(family["models"])
    first = measured[names[0]]["count"]
    code = "none published"
    if family["code"]:
        note = f" ({family['code_note']})" if "code_note" in family else ""
        code = f"{family['code']} at `{family['commit']}`, {family['license']} licence{note}"
    sections = [
        f"# {family['title']}\n\n{family['idea']}\n\n"
        f"- Paper: {family['paper']}, https://arxiv.org/abs/{family['arxiv']}\n"
        f"- Code: {code}",
        _use(key, names[0]),
        f"""## Models

{model_table(family, measured)}

Parameters and GMACs are measured by `tools/benchmark.py` (torch {first["torch"]}, {first["date"]};
GMACs are half the FLOPs of convolutions and matrix products for one image, activations what these put out). Top-1 is
ImageNet-1k validation accuracy as reported; we have not re-measured it.""",
        _speed(names, measured),
        *[_compute_points(name, measured[name]) for name in names if "compute_points" in measured[name]],
        _dense(key),
        _training(key, names),
        _weights(family),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in family["limits"]),
        "## Citation\n\n```bibtex\n" + "\n\n".join(map(bibtex, family["citation"])) + "\n```",
    ]
    head = front_matter(family["license"], family["datasets"], [key], reported_results(family))
    return head + "\n\n".join(section for section in sections if section) + "\n"


def _use(key: str, name: str) -> str:
    backbone: Any = timm.create_model(name, features_only=True, device="meta")
    strides = ", ".join(map(str, backbone.feature_info.reduction()))
    dense = [task for task in ("detection", "segmentation") if (CONFIGS / task / key).is_dir()]
    configs = " and ".join(f"[{task}](../configs/{task}/{key})" for task in dense)
    more = f"\nConfigs of {configs}." if dense else ""
    return f"""## Intended use

Classifying images after training or fine-tuning, and as a backbone of other models: features of stride {strides}.
Until weights are loaded a model is random.{more}

Not intended: decisions about people, and any use where a wrong answer does harm, without a test on data of that very
use. What a model learnt from ImageNet carries the choices and gaps of that collection.

```python
import timm, visattn

model = timm.create_model("{name}", num_classes=10)
features = timm.create_model("{name}", features_only=True)
```"""


def _speed(names: list[str], measured: dict[str, Any]) -> str:
    table = speed_table(names, measured)
    if not table:
        return ""
    about = []
    for bench in ("inference", "training"):
        records = [measured[name][bench] for name in names if bench in measured[name]]
        about += [f"{bench.capitalize()}: {runs(records)}."] if records else []
    return "\n\n".join(
        [
            "### Speed",
            "Medians of images per second, model and peer in turns in one run, measured by `tools/benchmark.py`. The\n"
            "peer is the same architecture in timm, or a plain model of timm of nearly equal MACs.",
            table,
            " ".join(about),
        ]
    )


def _compute_points(name: str, measured: dict[str, Any]) -> str:
    """What ``tools/compute_points.py`` measured of a model."""
    figures = measured["compute_points"]
    rows = "\n".join(
        f"| {f['compressed'].replace('peer', figures['peer'])} | {f['gmacs']:.2f} | {f['images_per_second']:.2f} "
        f"| {f['ratio_to_peer']:.2f} | {f['weights_mib']:.0f} | {f['activations_mib']:.0f} |"
        for f in figures["points"]
    )
    return f"""### {name} by compressed grid

| compressed grid | GMACs | images/s | times {figures["peer"]} | weights (MiB) | activations (MiB) |
|---|---:|---:|---:|---:|---:|
{rows}

`python tools/compute_points.py {name} -b {figures["batch_size"]} --rounds {figures["rounds"]}` on {figures["date"]}:
{figures["hardware"]}, torch with {figures["threads"]} of them, a load of {figures["load_before"]} by other work;
{figures["img_size"]} px, {figures["dtype"]}, torch {figures["torch"]}. All take turns in every round, so that the load
meets all; the speeds are medians, the ratio is the median of those within a round. Activations are the most that torch
holds at a time beside weights and images."""


@cache
def dense_models(key: str) -> list[dict[str, Any]]:
    """The detection and segmentation configs of a family, from its ``metafile.yml`` files."""
    paths = [CONFIGS / task / key / "metafile.yml" for task in ("detection", "segmentation")]
    return [
        model for path in paths if path.exists() for model in yaml.safe_load(path.read_text(encoding="utf-8"))["Models"]
    ]


def source_url(model: dict[str, Any]) -> str:
    """Where the source of a model in a ``metafile.yml`` lies: the paper, or ``OWNER/REPOSITORY@COMMIT``."""
    found = re.search(r"([\w.-]+/)?([\w.-]+)@(\w+)$", model["Source"])
    if not found:
        return model["Paper"]["URL"]
    owner, repository, commit = found.groups()
    home = f"https://github.com/{owner}" if owner else f"{model['Code']['URL']}/"
    return f"{home}{repository}/tree/{commit}"


def _dense(key: str) -> str:
    models = [model for model in dense_models(key) if model.get("Results")]
    if not models:
        return ""
    rows = [
        f"| [{model['Name']}](../{model['Config']}) "
        f"| {', '.join(f'{m} {v}' for result in model['Results'] for m, v in result['Metrics'].items())} "
        f"| {model['Metadata'].get('Parameters', '')} | {model['Metadata'].get('FLOPs', '')} | {model['Source']} |"
        for model in models
    ]
    sources = {model["Source"]: source_url(model) for model in models}
    return "\n".join(
        [
            "## Detection and segmentation",
            "",
            "On COCO and ADE20K, as reported; none has been measured here. `(ms)` is tested at several scales.",
            f"Sources: {', '.join(f'[{name}]({url})' for name, url in sources.items())}.",
            "",
            "| config | reported | parameters | FLOPs | source |",
            "|---|---|---:|---:|---|",
            *rows,
        ]
    )


def recipe_header(path: Path) -> dict[str, str]:
    """The comment at the head of a recipe: its entries, such as ``Hardware``, by name."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = "\n".join(line[1:] for line in lines)
    entries = re.findall(r"^ (\w+): +(.*(?:\n  .*)*)", comment, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


@cache
def _recipes() -> dict[Path, dict[str, Any]]:
    return {path: read_settings(path) for path in sorted((CONFIGS / "imagenet").glob("*.yaml"))}


def _training(key: str, names: list[str]) -> str:
    rows = []
    for path, settings in _recipes().items():
        if settings["model"] not in names:
            continue
        decay, drop = f"{settings['weight_decay']:g}", settings.get("drop_path") or ""
        rate = f"{settings['lr']:g}" if "lr" in settings else f"{settings['lr_base']:g} per {settings['lr_base_size']}"
        images = recipe_header(path)["Hardware"].rstrip(".").partition(" = ")[2]
        rows.append(
            f"| [{path.stem}](../configs/imagenet/{path.name}) | `{settings['model']}` | {settings['epochs']} "
            f"| {images} | {settings['opt']} | {rate} | {decay} | {drop} |"
        )
    digits = ""
    if (CONFIGS / "digits" / f"{key}.yaml").exists():
        digits = "What the small model learns of handwritten digits, measured: [configs/digits](../configs/digits)."
    if not rows:
        return f"## Training\n\n{digits}" if digits else ""
    return "\n".join(
        [
            "## Training",
            "",
            "Recipes for `tools/train.py`, after what is published; each says what its source leaves open. We have run "
            f"none of them\non ImageNet. {digits}".rstrip(),
            "",
            "| recipe | model | epochs | images per update | optimizer | learning rate | weight decay | drop path |",
            "|---|---|---:|---:|---|---|---:|---:|",
            *rows,
        ]
    )


def _weights(family: dict[str, Any]) -> str:
    """How weights come into the models, and which files have been converted here."""
    rows = [
        f"| `{name}` | `{file['file']}` | `{file['sha256']}` | {file['from']} | `{file['from_sha256']}` |"
        for name, facts in family["models"].items()
        for file in facts.get("converted", [])
    ]
    made = (
        "No file has been converted or checked here: none was within reach. `tools/convert.py` prints the SHA-256 of "
        "what it\nreads and writes."
    )
    if rows:
        made = "\n".join(["| model | file | its SHA-256 | made from | its SHA-256 |", "|---|---|---|---|---|", *rows])
    return f"## Weights\n\n{family['weights']}\n\n{made}"


def bibtex(entry: dict[str, Any]) -> str:
    """A BibTeX entry of its fields, with `type` and `key` beside them."""
    fields = [f"  {name} = {{{value}}}," for name, value in entry.items() if name not in ("type", "key")]
    return "\n".join([f"@{entry['type']}{{{entry['key']},", *fields, "}"])
