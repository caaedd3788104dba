"""Model cards: the hub can read their heads, and what they say of others has a source."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from visattn_tools import cards, tables
from visattn_tools.cards import bibtex, card, dense_models, recipe_header, source_url
from visattn_tools.cli import UserError
from visattn_tools.config import read_settings
from visattn_tools.results import measured

ROOT = Path(__file__).parents[2]
REPORTED: dict[str, Any] = json.loads((ROOT / "model_cards" / "reported.json").read_text())
MEASURED = measured()
# Identifiers of the hub's list of licences.
LICENCES = {"mit", "apache-2.0", "bsd-3-clause"}


def _text(key: str) -> str:
    return (ROOT / "model_cards" / f"{key}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", REPORTED)
def test_the_hub_reads_the_head(key: str) -> None:
    data = ModelCard(_text(key)).data
    assert (data.library_name, data.pipeline_tag) == ("timm", "image-classification")
    assert data.license in LICENCES
    assert {"timm", "visattn", key} <= set(data.tags)
    assert data.datasets
    top1 = {name: facts["top1"] for name, facts in REPORTED[key]["models"].items() if "top1" in facts}
    # The hub's class makes one list of the results of all models.
    results = data.eval_results or []
    assert [result.metric_value for result in results] == list(top1.values())
    for result in results:
        assert result.verified is False
        assert str(result.source_name).startswith("reported: ")
        assert str(result.source_url).startswith("https://")


@pytest.mark.parametrize("key", REPORTED)
def test_every_card_has_its_sections_and_its_links_lead_somewhere(key: str) -> None:
    text = _text(key)
    for title in ("Intended use", "Models", "Training", "Weights", "Limits", "Citation"):
        assert f"\n## {title}\n" in text
    assert ("\n## Detection and segmentation\n" in text) == any(m.get("Results") for m in dense_models(key))
    targets = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    assert [target for target in targets if not (ROOT / "model_cards" / target).exists()] == []


@pytest.mark.parametrize("key", REPORTED)
def test_the_papers_are_cited(key: str) -> None:
    family = REPORTED[key]
    numbers = {entry["eprint"] for entry in family["citation"]}
    assert family["arxiv"] in numbers
    assert set(re.findall(r"\d{4}\.\d{5}", family["paper"])) <= numbers
    for entry in family["citation"]:
        assert bibtex(entry) in _text(key)
        assert entry["title"] in family["paper"]
        assert " and " in entry["author"]


def test_dense_figures_are_those_of_the_metafiles() -> None:
    rows = [line for line in _text("davit").splitlines() if line.startswith("| [mask-rcnn_davit-t")]
    assert [row.split(" | ")[1] for row in rows] == ["box AP 45.0, mask AP 41.1", "box AP 47.4, mask AP 42.9"]


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("README of a/b@1a2b", "https://github.com/a/b/tree/1a2b"),
        ("README of b@1a2b", "https://github.com/a/b/tree/1a2b"),
        ("paper, table 9", "https://arxiv.org/abs/1"),
    ],
)
def test_a_source_has_an_address(source: str, url: str) -> None:
    model = {"Source": source, "Paper": {"URL": "https://arxiv.org/abs/1"}, "Code": {"URL": "https://github.com/a"}}
    assert source_url(model) == url


def test_speed_and_converted_files_are_shown_where_there_are_some() -> None:
    run = {"hardware": "NVIDIA H200", "torch": "2.11.0", "dtype": "bfloat16 autocast", "date": "2026-11-26"}
    run |= {"channels_last": True, "compiled": "", "batch_size": 128, "peer": "davit_tiny"}
    run |= {"peer_images_per_second": 5689.2}
    figures = copy.deepcopy(MEASURED)
    for name in REPORTED["davit"]["models"]:  # whatever has been measured of them
        figures[name].pop("inference", None)
    figures["davit_t"]["inference"] = run | {"images_per_second": 12345.6, "ratio_to_peer": 2.17}
    family = copy.deepcopy(REPORTED["davit"])
    file = {"file": "davit_t.safetensors", "sha256": "a" * 64, "from": "davit_tiny.pth", "from_sha256": "b" * 64}
    family["models"]["davit_t"]["converted"] = [file]
    text = card("davit", family, figures)
    assert "| `davit_t` | 12,346 | `davit_tiny` | 5,689 | 2.17x | 128 |" in text
    assert "Inference: NVIDIA H200, bfloat16 autocast, channels last, eager, torch 2.11.0, 2026-11-26." in text
    assert "a" * 64 in text
    assert "b" * 64 in text
    assert "No file has been converted" not in text
    assert "No file has been converted" in card("davit", REPORTED["davit"], MEASURED)


def test_a_card_follows_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that changes where it comes from changes the card, so that the check of the pages finds it."""
    family = copy.deepcopy(REPORTED["davit"])
    text = card("davit", family, MEASURED)
    assert text.count("value: 82.8") == 1
    assert "box AP 45.0" in text
    assert "| [davit_t](../configs/imagenet/davit_t.yaml) | `davit_t` | 300 |" in text
    family["models"]["davit_t"]["top1"] = 82.9
    assert "value: 82.8" not in card("davit", family, MEASURED)
    dense = copy.deepcopy(dense_models("davit"))
    dense[0]["Results"][0]["Metrics"]["box AP"] = 45.1
    monkeypatch.setattr(cards, "dense_models", lambda key: dense)
    assert "box AP 45.0" not in card("davit", family, MEASURED)
    path = ROOT / "configs" / "imagenet" / "davit_t.yaml"
    monkeypatch.setattr(cards, "_recipes", lambda: {path: read_settings(path) | {"epochs": 301}})
    assert "`davit_t` | 301 |" in card("davit", family, MEASURED)


def test_the_check_of_the_pages_fails_for_one_changed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = copy.deepcopy(MEASURED)
    figures["davit_t"]["count"]["params"] += 100_000
    monkeypatch.setattr(tables, "measured_figures", lambda: figures)
    with pytest.raises(UserError, match=r"out of date: README\.md, .*model_cards/davit\.md; run"):
        tables.main(["--check"])


def test_recipe_header(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# Title.\n#\n# Hardware:  8 GPUs\n#            = 8.\n# Time:      one: hour\nmodel: x # Time: no\n"
    )
    assert recipe_header(path) == {"Hardware": "8 GPUs = 8.", "Time": "one: hour"}
