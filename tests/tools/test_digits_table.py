"""The table of digits: figures of made-up runs, runs that are not what they should be, and the committed figures."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import yaml
from visattn_tools import digits_table
from visattn_tools.cli import UserError
from visattn_tools.config import config_text, parse_train_args
from visattn_tools.digits_table import figures, fingerprint, main, page, problems, read_results, recipes
from visattn_tools.run_folder import RunFolder

RECIPE = """# A comment.
model: test_ninformer
model_kwargs:
  depth: 2
dataset: digits
img_size: 64
experiment: made_up
overwrite: true
epochs: 3
lr: 2.0e-3
scale: [0.7, 1.0]
"""
LOG = (
    ("start", "10:00:00", {"hardware": "Abacus, 2 cores", "threads": 1, "torch": "9.9.1+cpu"}),
    ("epoch", "10:00:30", {}),
    ("interrupted", "10:00:45", {}),
    ("resume", "11:00:00", {}),
    ("epoch", "11:00:20", {}),
    ("epoch", "11:01:10", {}),
    ("end", "11:01:30", {}),
)
TOP1 = (50.0, 97.7777, 96.1111)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A folder of recipes with one in it."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(digits_table, "RECIPES", folder)
    path = folder / "made.yaml"
    path.write_text(RECIPE)
    return path


def make_run(recipe, runs, epochs=3, log=LOG, **changes):
    """A run folder as training leaves it, without weights and pictures."""
    args = parse_train_args(["--config", str(recipe)])
    for key, value in changes.items():
        setattr(args, key, value)
    run = RunFolder(runs / args.experiment)
    run.path.mkdir(parents=True)
    run.config.write_text(config_text(args))
    rows = ({"epoch": i + 1, "train_loss": 1.0, "eval_top1": top1} for i, top1 in enumerate(TOP1[:epochs]))
    run.write_summary([{"eval_loss": 1.0, "eval_top5": 99.0, "lr": 0.1} | row for row in rows])
    lines = [{"event": event, "time": f"2026-01-02T{time}+0000", **more} for event, time, more in log]
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_figures_of_a_run(recipe, tmp_path):
    make_run(recipe, tmp_path / "runs")
    model = timm.create_model("test_ninformer", num_classes=10, depth=2, device="meta")
    assert figures(recipe, tmp_path / "runs") == {
        "model": "test_ninformer",
        "params": sum(p.numel() for p in model.parameters()),
        "epochs": 3,
        "seconds": 30 + 70,  # neither the pause, nor what was lost, nor the pictures
        "best_top1": 97.78,
        "best_epoch": 2,
        "last_top1": 96.11,
        "seed": 42,
        "torch": "9.9.1",
        "hardware": "Abacus, 2 cores",
        "threads": 1,
        "date": "2026-01-02",
        "recipe": fingerprint(recipe),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"made_up holds no run of made.yaml; add --train to make one"),
        ({"lr": 0.1}, r"made_up was run with other settings than made.yaml has: lr 0.1, not 0.002$"),
        ({"epochs": 2}, "has 2 of 3 epochs; wait for its end, or go on with --resume"),
        ({"log": LOG[:-1]}, "has 3 of 3 epochs; wait for its end"),
        ({"log": (("start", "10:00:00", {"torch": "9"}), *LOG[1:])}, r"log.jsonl names no hardware.* add --train"),
    ],
)
def test_runs_that_do_not_count(recipe, tmp_path, change, message):
    if change is not None:
        make_run(recipe, tmp_path / "runs", **change)
    with pytest.raises(UserError, match=message):
        figures(recipe, tmp_path / "runs")


def test_only_settings_make_the_fingerprint(recipe):
    before = fingerprint(recipe)
    recipe.write_text(RECIPE.replace("A comment", "Another").replace("made_up", "elsewhere"))
    assert fingerprint(recipe) == before
    recipe.write_text(RECIPE.replace("2.0e-3", "3.0e-3"))
    assert fingerprint(recipe) != before


def test_command(recipe, tmp_path, capsys):
    runs = tmp_path / "runs"
    make_run(recipe, runs)
    other = recipe.with_name("other.yaml")
    other.write_text(RECIPE.replace("made_up", "second").replace("epochs: 3", "epochs: 1"))
    make_run(other, runs, epochs=1, log=(*LOG[:2], LOG[-1]))
    with pytest.raises(UserError, match=r"made.yaml has no figures; other.yaml has no figures: run python tools"):
        main(["--check"])
    main(["--runs", str(runs)])
    assert capsys.readouterr().out == "made: 97.8 % best, 96.1 % last, 1:40\nother: 50.0 % best, 50.0 % last, 0:30\n"
    main(["--check"])
    text = recipe.with_name("README.md").read_text()
    assert "| [made](made.yaml) | `test_ninformer` | 0.02 | 3 | 1:40 | 97.8 | 96.1 |" in text
    assert "| [other](other.yaml) | `test_ninformer` | 0.02 | 1 | 0:30 | 50.0 | 50.0 |" in text
    assert "- made, other: Abacus, 2 cores, 1 thread for the training, torch 9.9.1, 2026-01-02" in text

    shutil.rmtree(runs / "made_up")
    main(["other", "--runs", str(runs)])  # the other figures stay
    assert recipe.with_name("README.md").read_text() == text
    recipe.write_text(RECIPE.replace("2.0e-3", "3.0e-3"))
    with pytest.raises(UserError, match=r"made.yaml has changed since its figures were measured: run"):
        main(["--check"])
    recipe.unlink()
    with pytest.raises(UserError, match=r"README.md does not show results.json"):
        main(["--check"])
    main(["--runs", str(runs)])
    assert list(read_results()) == ["other"]
    with pytest.raises(UserError, match="no recipe 'othr' in recipes; there are other; did you mean 'other'"):
        main(["othr"])


@pytest.mark.slow
def test_training_makes_the_runs(recipe, tmp_path):
    recipe.write_text(
        "model: test_efficientnet\ndataset: digits\nimg_size: 32\n"
        "experiment: real\nepochs: 1\nworkers: 0\ndevice: cpu\n"
    )
    for _ in range(2):  # the second replaces the first
        main(["--train", "--runs", str(tmp_path / "runs")])
    found = json.loads(recipe.with_name("results.json").read_text())["made"]
    assert found["epochs"] == 1
    assert 0 < found["seconds"] < 500
    assert found["hardware"]
    assert problems() == []


def test_committed_figures_are_those_of_the_recipes():
    assert problems() == [], "run python tools/digits_table.py --train"
    assert (digits_table.RECIPES / "README.md").read_text(encoding="utf-8") == page(read_results())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_family_learns_the_digits(name):
    """At least 95 % in at most five minutes on two cores; figures of the committed model."""
    found, recipe = read_results()[name], yaml.safe_load(recipes()[name].read_text())
    assert found["best_top1"] >= 95
    assert found["last_top1"] >= 95
    assert found["seconds"] <= 300
    kwargs = recipe.get("model_kwargs", {})
    model = timm.create_model(recipe["model"], num_classes=10, device="meta", **kwargs)
    assert found["params"] == sum(p.numel() for p in model.parameters())


def test_every_token_family_has_a_recipe():
    assert {"dependencyvit", "lookupvit", "ninformer", "sparsifiner"} <= set(recipes())
    assert all(Path(path).read_text().startswith("# ") for path in recipes().values())
