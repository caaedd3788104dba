"""Figures in the README and the cards are what was measured, and what was measured is still true."""

import json
from pathlib import Path

import pytest
from visattn_tools import kernel_tables, model_tables, tables
from visattn_tools.benchmark import count, main
from visattn_tools.cards import card
from visattn_tools.cli import UserError
from visattn_tools.model_tables import main_table, model_table, page
from visattn_tools.peers import peer_of
from visattn_tools.results import add_results, load, measured
from visattn_tools.tables import fill, pages

import visattn

ROOT = Path(__file__).resolve().parents[2]
MEASURED = measured()
REPORTED = json.loads((ROOT / "model_cards" / "reported.json").read_text())


def test_every_model_has_its_row():
    rows = {name for family in REPORTED.values() for name in family["models"]}
    assert rows == {name for name in visattn.list_models() if not name.startswith("test_")}


@pytest.mark.parametrize("name", sorted(name for name, figures in MEASURED.items() if "count" in figures))
def test_counts_are_still_true(name):
    now = count(name)
    record = MEASURED[name]["count"]
    assert {key: record[key] for key in now} == now
    assert record.get("peer") == peer_of(name, now["gmacs"], now["input_size"])


def test_a_model_without_figures_is_named():
    with pytest.raises(
        UserError, match=r"biformer_t is not in model_cards/results/count.json; run tools/benchmark.py biformer_t"
    ):
        model_table(REPORTED["biformer"], {})


def test_card_names_paper_code_and_limits():
    family = REPORTED["biformer"]
    text = card("biformer", family, MEASURED)
    assert "https://arxiv.org/abs/2303.08810" in text
    assert family["commit"] in text
    assert all(limit in text for limit in family["limits"])


def test_benchmark_refuses_an_unknown_model_and_a_broken_file(tmp_path):
    with pytest.raises(UserError, match="unknown model 'biformer_z'; did you mean 'biformer_"):
        main(["biformer_z"])
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"results.json exists and is no file of results"):
        main(["test_biformer", "--output", str(path)])
    assert path.read_text() == "{"


@pytest.fixture(scope="module")
def made():
    return pages()


def test_the_command_finds_pages_that_are_out_of_date(made, monkeypatch, capsys):
    monkeypatch.setattr(tables, "pages", lambda: made)
    tables.main(["--check"])
    changed_pages = {path: text.replace("| 81.4 |", "| 81.5 |") for path, text in made.items()}
    monkeypatch.setattr(tables, "pages", lambda: changed_pages)
    changed = "README.md, model_cards/README.md, model_cards/biformer.md"
    with pytest.raises(UserError, match=rf"^out of date: {changed}; run python tools/make_tables.py$"):
        tables.main(["--check"])
    assert capsys.readouterr().out == ""


def test_every_page_with_figures_is_written(made):
    names = {path.relative_to(ROOT).as_posix() for path in made}
    assert {"README.md", "kernels/README.md", "configs/SCALING.md", "configs/digits/README.md"} < names
    assert {f"model_cards/{key}.md" for key in [*REPORTED, "README"]} < names


def test_blocks_and_places_belong_together(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- one: written by tools/make_tables.py -->\nold\n<!-- /one -->\nb\n")
    text = "a\n<!-- one: written by tools/make_tables.py -->\nnew\n<!-- /one -->\nb\n"
    assert fill(path, {"one": "new"}) == text
    with pytest.raises(UserError, match=r"page.md has no place for two: a line '<!-- two: written by"):
        fill(path, {"one": "new", "two": "x"})
    with pytest.raises(UserError, match=r"page.md has a place for one, of which there are no figures"):
        fill(path, {})


FAMILY = {
    "small": {
        "title": "Small",
        "source": "README of a/b@1",
        "main": ["x_t"],
        "models": {"x_t": {"top1": 81.44}, "x_mini": {"note": "ours"}},
    }
}
ABOUT = {
    "hardware": "Card",
    "dtype": "bfloat16 autocast",
    "channels_last": True,
    "compiled": "",
    "torch": "2",
    "date": "D",
}


def _figures():
    count = {"params": 13_140_000, "gmacs": 2.2159, "activations_m": 14.444, "input_size": [3, 224, 224]}
    count |= {"peer": "convnext_nano", "peer_gmacs": 2.5}
    speed = {"images_per_second": 12345.6, "batch_size": 128, "backend": "auto", **ABOUT}
    beside = {"peer": "convnext_nano", "peer_images_per_second": 6000.4, "ratio_to_peer": 2.057}
    return {
        "x_t": {"count": count, "inference": speed | beside, "training": speed | beside | {"images_per_second": 999.0}},
        "x_mini": {"count": count | {"peer_gmacs": 1.0}, "inference": speed},
    }


def test_speeds_stand_beside_those_of_the_peer(monkeypatch):
    text = main_table(FAMILY, _figures())
    row = "| [`x_t`](model_cards/small.md) | 13.1 | 2.22 | 224 | 81.4 | 12,346 | `convnext_nano` | 6,000 | 2.06x |"
    assert text.splitlines()[2] == row
    assert "Small: README of a/b@1. Images/s of inference, model and peer in turns in one run: Card, bf" in text
    assert text.endswith("Card, bfloat16 autocast, channels last, eager, torch 2, D.")
    monkeypatch.setattr(model_tables, "load", lambda kind: [])
    rows = page(FAMILY, _figures()).splitlines()
    assert "| `x_t` | 13.14 | 2.216 | 14.44 | 224x224 | 81.4 | README of a/b@1 |" in rows
    assert "| `x_mini` | 13.14 | 2.216 | 14.44 | 224x224 |  | ours |" in rows
    assert "| `x_t` | 12,346 | `convnext_nano` | 6,000 | 2.06x | 128 | 2.500 | 999 | 6,000 | 2.06x | 128 |" in rows
    assert "| `x_mini` | 12,346 |  |  |  | 128 |  |  |  |  |  |" in rows


def test_what_is_not_measured_is_blank(monkeypatch):
    figures = {name: {"count": kinds["count"]} for name, kinds in _figures().items()}
    assert main_table(FAMILY, figures).splitlines()[2].endswith("| 224 | 81.4 |  |  |  |  |")
    records = [
        {"model": "x_t", "batch_size": 8, **ABOUT, "backend": b, "images_per_second": n}
        for b, n in (("a", 3), ("b", 1))
    ]
    monkeypatch.setattr(model_tables, "load", lambda kind: [*records, records[0] | {"model": "x_mini"}])
    rows = page(FAMILY, figures).splitlines()
    assert "| model | batch | `a` | `b` |" in rows
    assert "| `x_t` | 8 | 3 | 1 |" in rows
    assert not any(row.startswith("| `x_mini` | 8") for row in rows)


def _document(kernels):
    row = {"shape": "1, 2", "floor_ms": 0.5, "failed": {}, "ours_fwd_ms": 2.0, "ours_both_ms": 4.0}
    row |= {"ours_fwd_kernels_ms": 1.0, "ours_both_kernels_ms": 2.0, "ours_fwd_mb": 1.0, "ours_both_mb": 2.0}
    for name, ms in (("flex", 8.0), ("plain", 6.0)):
        row |= {f"{name}_fwd_ms": ms, f"{name}_both_ms": 2 * ms, f"{name}_fwd_mb": 10.0, f"{name}_both_mb": 20.0}
        if kernels:
            row |= {f"{name}_fwd_kernels_ms": ms / 2, f"{name}_both_kernels_ms": ms}
    missing = {key: value for key, value in row.items() if not key.startswith("plain")}
    about = {
        "command": "python it",
        "operator": "neighborhood",
        "card": "Card",
        "torch": "2.1+cu1",
        "date": "D",
        "dtype": "half",
    }
    return {"about": about, "rows": [row, missing]}


@pytest.mark.parametrize("kernels", [False, True])
def test_ratios_are_to_the_fastest_peer(kernels, tmp_path):
    (tmp_path / "neighborhood_card.json").write_text(json.dumps(_document(kernels)))
    lines = kernel_tables.blocks(tmp_path)["neighborhood_card"].splitlines()
    assert lines[0] == "`python it`, D, Card, torch 2.1, half:"
    if kernels:
        assert "| 1, 2 | 1.000 | 4.000 | 3.000 | 3.0x | 0.500 (2.0x) | 1 / 10 |" in lines
        assert "| 1, 2 | 1.000 | 4.000 | - | 4.0x | 0.500 (2.0x) | 1 / 10 |" in lines
    else:
        assert "| 1, 2 | 2.000 | 1.000 | 8.000 | 6.000 | 3.0x | 0.500 (2.0x) | 1 / 10 |" in lines
        assert "| 1, 2 | 2.000 | 1.000 | 8.000 | - | 4.0x | 0.500 (2.0x) | 1 / 10 |" in lines
        assert "| 1, 2 | 4.000 | 16.000 | 12.000 | 3.0x | 2 / 20 |" in lines
    assert lines[-1] == "Geometric means against the fastest of them: forward 3.5x, forward + backward 3.5x."
    row = kernel_tables.summary(tmp_path).splitlines()[2]
    peers, spread = "the fastest of compiled FlexAttention, our plain torch", "3.5x (3.0 to 4.0x)"
    assert row == f"| neighborhood attention | {peers} | 2 | {spread} | {spread} | D, Card, half |"


def test_a_run_that_says_nothing_of_itself_is_refused(tmp_path):
    (tmp_path / "halo.json").write_text(json.dumps({"about": {"torch": "2"}, "rows": []}))
    with pytest.raises(UserError, match=r"halo.json says nothing about command, date of its run"):
        kernel_tables.blocks(tmp_path)


def test_records_of_the_same_kind_replace_each_other(tmp_path):
    path = tmp_path / "inference_a.json"
    old = {"model": "m", "bench": "inference", "hardware": "A", "date": "2026-01-01", "images_per_second": 1}
    add_results(path, [old, old | {"model": "n"}])
    add_results(path, [old | {"images_per_second": 2}, old | {"hardware": "B", "date": "2026-01-02"}])
    assert [(r["model"], r["hardware"], r["images_per_second"]) for r in load("inference", tmp_path)] == [
        ("m", "A", 2),
        ("m", "B", 1),
        ("n", "A", 1),
    ]
    assert len(path.read_text().splitlines()) == 5
    assert measured(tmp_path)["m"]["inference"]["hardware"] == "B"
    assert load("infer", tmp_path) == []
