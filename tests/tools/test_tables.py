"""Figures in the README and the cards are what was measured, and what was measured is still true."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from visattn_tools.benchmark import count, main
from visattn_tools.cards import card
from visattn_tools.cli import UserError
from visattn_tools.results import measured
from visattn_tools.tables import model_table, pages

import visattn

ROOT = Path(__file__).resolve().parents[2]
MEASURED = measured()
REPORTED = json.loads((ROOT / "model_cards" / "reported.json").read_text())


def test_pages_are_up_to_date():
    stale = [path.name for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python tools/make_tables.py"


def test_every_model_has_its_row():
    rows = {name for family in REPORTED.values() for name in family["models"]}
    assert rows == {name for name in visattn.list_models() if not name.startswith("test_")}


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_counts_are_still_true(name):
    now = count(name)
    assert {key: MEASURED[name]["count"][key] for key in now} == now


def test_a_model_without_figures_is_named():
    with pytest.raises(
        UserError, match=r"biformer_t is not in model_cards/results/count.json; run tools/benchmark.py biformer_t"
    ):
        model_table(REPORTED, {})


def test_card_names_paper_code_and_limits():
    family = REPORTED["biformer"]
    text = card("biformer", family, MEASURED, model_table({"biformer": family}, MEASURED))
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


def test_check_of_the_command():
    done = subprocess.run([sys.executable, "tools/make_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
