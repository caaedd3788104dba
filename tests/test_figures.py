"""Figures that people write by hand, in docstrings and in the README, are those of the results."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
from visattn_tools.benchmark import count
from visattn_tools.results import load, measured

import visattn

ROOT = Path(__file__).parents[1]
FAMILIES = json.loads((ROOT / "model_cards" / "reported.json").read_text())
REPORTED = {name: facts for family in FAMILIES.values() for name, facts in family["models"].items()}
MEASURED = measured()
MODELS = [name for name in visattn.list_models() if not name.startswith("test_")]


DEPTH = {"lookupvit_l16": 24}  # of the others 12


@cache
def _with_grid(name: str, side: int) -> float:
    """GMACs of a LookupViT with a compressed grid of this side, from what one and two of its equal blocks take."""
    one, two = (count(name, None, {"compressed_size": side, "depth": depth})["gmacs"] for depth in (1, 2))
    return one + (DEPTH.get(name, 12) - 1) * (two - one)


@cache
def _with_all_pairs(name: str) -> float:
    return count(name, None, {"attn_keep_rate": 1.0})["gmacs"]


def _says(text: str, value: float) -> bool:
    """Whether `text` is `value` with as many decimals as it has itself, rounded in either way at a half."""
    decimals = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-decimals * (1 + 1e-9)


def _expected_gmacs(name: str, doc: str) -> list[float]:
    if "GMACs with all pairs" in doc:
        return [_with_all_pairs(name)]
    if "compressed tokens." in doc:
        sides = re.findall(r"(\d+)x\1", doc)
        return [_with_grid(name, int(side)) for side in sides]
    return [MEASURED[name]["count"]["gmacs"]]


def complaints(name: str, doc: str, facts: dict[str, Any], params: int) -> list[str]:
    """What in the docstring of a model is not what was measured or reported."""
    doc = " ".join(doc.split())
    found = []
    parameters = re.search(r"([\d.]+) M parameters", doc)
    if not parameters or not _says(parameters[1], params / 1e6):
        found.append(f"{name} has {params / 1e6:.3f} M parameters")
    gmacs = re.search(r"([\d., or]+) GMACs", doc)
    if gmacs:
        numbers = re.findall(r"\d+\.\d+", gmacs[1])
        expected = _expected_gmacs(name, doc)
        if len(numbers) != len(expected) or not all(map(_says, numbers, expected)):
            found.append(f"{name} has {expected} GMACs")
    elif not name.endswith("_mini"):
        found.append(f"{name} does not say its GMACs")
    claim = re.search(r"Top-1 ([\d.]+) reported", doc) or re.search(r"Top-1 by .*?([\d.]+) at 0.25", doc)
    if "top1" in facts:
        if not claim or not _says(claim[1], facts["top1"]):
            found.append(f"{name} has a reported top-1 of {facts['top1']}")
    elif claim and claim[1] not in facts.get("note", ""):
        found.append(f"{name} has no reported top-1 of {claim[1]}")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_docstring(name: str) -> None:
    doc = timm.model_entrypoint(name).__doc__ or ""
    assert complaints(name, doc, REPORTED[name], MEASURED[name]["count"]["params"]) == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("biformer_t", "13.1 M", "13.2 M"),
        ("biformer_t", "2.2 GMACs", "2.3 GMACs"),
        ("biformer_t", "81.4 reported", "81.5 reported"),
        ("halonet_50", "78.6 reported", "78.7 reported"),
        ("halonet_h0_256", "Top-1 in a figure only", "Top-1 77.9 reported"),
        ("sparsifiner_lv_m", "83.83 at 0.25", "83.85 at 0.25"),
        ("sparsifiner_t16", "1.34 GMACs", "1.21 GMACs"),
        ("lookupvit_t16", "0.78 or", "0.79 or"),
        ("van_b0", ", 0.86 GMACs", ""),
    ],
)
def test_a_wrong_docstring_is_found(name: str, old: str, new: str) -> None:
    doc = " ".join((timm.model_entrypoint(name).__doc__ or "").split())
    assert old in doc
    assert len(complaints(name, doc.replace(old, new), REPORTED[name], MEASURED[name]["count"]["params"])) == 1


README = (ROOT / "README.md").read_text(encoding="utf-8")
MOVES = README.split("### Moving from timm")[1].split("\n## ")[0]


def _models_of(cell: str) -> list[str]:
    return [word for word in re.findall(r"`(\w+)`", cell.split(";")[0]) if not word.endswith("=")]


def test_names_to_move_to() -> None:
    """Every row of the table names as many models there as here; ours exist, and timm's do in timm."""
    rows = [line.strip("| ").split(" | ") for line in MOVES.splitlines() if line.startswith("| ")][1:]
    pairs = [(there, old, new) for there, here in rows for old, new in zip(_models_of(there), _models_of(here))]
    assert len(pairs) == sum(len(_models_of(there)) for there, _ in rows) == 21
    for there, old, new in pairs:
        assert new in MODELS
        if there.startswith("timm "):
            assert timm.is_model(old)
            theirs: Any = timm.create_model(old, device="meta")
            assert sum(p.numel() for p in theirs.parameters()) == MEASURED[new]["count"]["params"]


@pytest.mark.parametrize("kind", ["inference", "training", "backends"])
def test_no_disturbed_record_is_kept(kind: str) -> None:
    """Of models that take turns, one whose rounds differ by so much had other work beside it."""
    records = [record for record in load(kind) if record["hardware"].startswith("NVIDIA")]
    assert records
    for record in records:
        low, high = record["step_ms_quartiles"]
        assert high - low <= record["step_ms"] / 3, record["model"]


def test_version_to_cite() -> None:
    assert f"version = {{{visattn.__version__}}}" in README


def test_what_a_smaller_grid_saves() -> None:
    """The example of a LookupViT in the README."""
    points = {point["compressed"]: point["gmacs"] for point in MEASURED["lookupvit_b16"]["compute_points"]["points"]}
    assert f"{points['3x3']:.1f} instead of {points['10x10']:.1f} GMACs" in README


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_names_licence_code_and_paper_of_the_card(name: str) -> None:
    cfg: Any = timm.get_pretrained_cfg(name)
    family = next(f for f in FAMILIES.values() if name in f["models"])
    assert cfg.license == family["license"].lower()
    assert cfg.origin_url in (None, family["code"])
    papers = [f"arXiv:{entry['eprint']}" for entry in family["citation"]]
    assert cfg.paper_ids is None or cfg.paper_ids in papers
    assert cfg.num_classes in (0, 10, 1000)


UNITS = r"images/s|images per second|ms\b|s\b|seconds|[KMG]i?B\b|GMACs|TFLOP|M parameters|% (?:faster|less|top)"
FIGURE = re.compile(rf"\d[\d,.]*(?:x\b|\s*(?:{UNITS}))")
"""What looks measured: a number with a unit of speed, memory or accuracy."""


def hand_written(text: str) -> list[str]:
    """Figures in the prose of a page, outside of what ``tools/make_tables.py`` writes and outside of code."""
    text = re.sub(r"<!-- (\S+): written by .*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return FIGURE.findall(text)


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md", "CONTRIBUTING.md"])
def test_no_figure_is_written_by_hand(page: str) -> None:
    """One that is wanted in prose goes into a block that is made from results."""
    assert hand_written((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`davit_t` runs at 13,713 images/s", ["13,713 images/s"]),
        ("2.2x as fast, 5.9 ms, 12 MiB", ["2.2x", "5.9 ms", "12 MiB"]),
        ("<!-- a: written by x -->\n13 ms\n<!-- /a -->\n7 ms", ["7 ms"]),
        ("```\n13 ms\n```, 224x224 and Python 3.10", []),
    ],
)
def test_what_counts_as_a_figure(text: str, found: list[str]) -> None:
    assert hand_written(text) == found
