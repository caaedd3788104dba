"""The table of what every family learns of the digits, from runs of the recipes in ``configs/digits``.

``results.json`` beside the recipes holds the figures of finished runs, ``README.md`` shows them. Nothing else puts a
figure into either.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import yaml

import visattn  # noqa: F401  registers the models

from .cli import Parser, UserError, nearest
from .config import PLACES, parse_train_args, saved_config
from .files import write_text
from .progress import duration
from .run_folder import RunFolder
from .training import train

RECIPES = Path(__file__).parents[2] / "configs" / "digits"
WHERE = (*PLACES, "output", "experiment")
"""Settings of a recipe that say where a run lies, not what it is."""


def recipes() -> dict[str, Path]:
    """The recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _settings(recipe: Path) -> dict[str, Any]:
    """What a recipe says about the run itself."""
    given = {str(key).replace("-", "_") for key in yaml.safe_load(recipe.read_text(encoding="utf-8"))}
    values = saved_config(parse_train_args(["--config", str(recipe)]))
    return {key: values[key] for key in sorted(given.difference(WHERE))}


def fingerprint(recipe: Path) -> str:
    """A short hash of a recipe's settings; comments and places do not count."""
    return hashlib.sha256(json.dumps(_settings(recipe), sort_keys=True).encode()).hexdigest()[:12]


def _seconds(events: list[dict[str, Any]]) -> float:
    """Time from each start, or resumption, to the last epoch after it: neither start-up nor pictures."""
    total, begin, last = 0.0, None, None
    for event in [*events, {"event": "resume", "time": events[-1]["time"]}]:
        time = datetime.strptime(event["time"], "%Y-%m-%dT%H:%M:%S%z")
        if event["event"] in ("start", "resume"):
            total += (last - begin).total_seconds() if begin and last else 0.0
            begin, last = time, None
        elif event["event"] == "epoch":
            last = time
    return total


def figures(recipe: Path, runs: Path) -> dict[str, Any]:
    """The figures of the finished run of a recipe.

    Args:
        recipe: The recipe.
        runs: Folder of the run folders.

    Raises:
        UserError: There is no such run, it has not come to its end, or it was run with other settings.
    """
    args = parse_train_args(["--config", str(recipe)])
    run = RunFolder(runs / args.experiment)
    if not run.config.is_file():
        raise UserError(f"{run.path} holds no run of {recipe.name}; add --train to make one")
    made = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    other = [
        f"{key} {made.get(key)}, not {value}" for key, value in _settings(recipe).items() if made.get(key) != value
    ]
    if other:
        raise UserError(f"{run.path} was run with other settings than {recipe.name} has: {'; '.join(other)}")
    events = [json.loads(line) for line in run.log_file.read_text(encoding="utf-8").splitlines()]
    with open(run.summary, encoding="utf-8", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    if len(rows) != args.epochs or not any(event["event"] == "end" for event in events):
        raise UserError(f"{run.path} has {len(rows)} of {args.epochs} epochs; wait for its end, or go on with --resume")
    first = events[0]
    if "hardware" not in first:
        raise UserError(f"{run.log_file} names no hardware: an older version made it; add --train to run it again")
    best = max(rows, key=lambda row: row["eval_top1"])
    model = timm.create_model(args.model, num_classes=10, device="meta", **args.model_kwargs)
    return {
        "model": args.model,
        "params": sum(p.numel() for p in model.parameters()),
        "epochs": args.epochs,
        "seconds": _seconds(events),
        "best_top1": round(best["eval_top1"], 2),
        "best_epoch": int(best["epoch"]),
        "last_top1": round(rows[-1]["eval_top1"], 2),
        "seed": args.seed,
        "torch": first["torch"].split("+")[0],
        "hardware": first["hardware"],
        "threads": first["threads"],
        "date": first["time"][:10],
        "recipe": fingerprint(recipe),
    }


def page(results: dict[str, dict[str, Any]]) -> str:
    """``README.md`` of the recipes."""
    rows = "\n".join(
        f"| [{name}]({name}.yaml) | `{f['model']}` | {f['params'] / 1e6:.2f} | {f['epochs']} "
        f"| {duration(f['seconds'])} | {f['best_top1']:.1f} | {f['last_top1']:.1f} |"
        for name, f in results.items()
    )
    conditions: dict[str, list[str]] = {}
    for name, f in results.items():
        threads = f"{f['threads']} thread{'s' if f['threads'] > 1 else ''} for the training"
        where = f"{f['hardware']}, {threads}, torch {f['torch']}, {f['date']}"
        conditions.setdefault(where, []).append(name)
    places = "\n".join(f"- {', '.join(names)}: {where}" for where, names in conditions.items())
    return f"""# What the families learn of the digits

Small models from random weights on scikit-learn's 1,797 handwritten digits: 1,437 to train on, 360 held out. That a
family trains is all this shows; it ranks nothing, and 0.3 % is one digit.

| recipe | model | parameters (M) | epochs | time | best top-1 % | last top-1 % |
|---|---|---:|---:|---:|---:|---:|
{rows}

One run each with the recipe's seed; the head of every recipe gives the accuracies of three seeds, taken before training
could stop and go on inside an epoch, which changed the order of the images. On another processor or version, which may
round otherwise, a run can end a few digits better or worse. The best epoch is chosen on the same held-out digits, which
flatters it a little. Parameters include a head of 10 classes. The time, in minutes and seconds,
is that of all epochs with their evaluation, without start-up and pictures, on a machine that had other work as well:

{places}

Written by `python tools/digits_table.py` from `summary.csv` and `log.jsonl` of the runs; `--train` makes the runs.
"""


def read_results() -> dict[str, dict[str, Any]]:
    """The figures of all recipes that still exist."""
    path = RECIPES / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: results[name] for name in recipes() if name in results}


def problems() -> list[str]:
    """What is out of date: recipes without figures or changed since, a page that shows others."""
    results, found = read_results(), []
    for name, recipe in recipes().items():
        if name not in results:
            found.append(f"{recipe.name} has no figures")
        elif results[name]["recipe"] != fingerprint(recipe):
            found.append(f"{recipe.name} has changed since its figures were measured")
    readme = RECIPES / "README.md"
    if not found and (not readme.exists() or readme.read_text(encoding="utf-8") != page(results)):
        found.append("README.md does not show results.json")
    return found


def main(argv: Sequence[str] | None) -> None:
    """``tools/digits_table.py``.

    Raises:
        UserError: An unknown recipe, a run that is missing, unfinished or another's, or with ``--check`` figures that
            are out of date.
    """
    parser = Parser(prog="digits_table.py", description=__doc__)
    known = recipes()
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="default: all; the others' figures stay")
    parser.add_argument("--train", action="store_true", help="run the recipes first, one after another")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of the run folders")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if figures are out of date")
    args = parser.parse(argv)
    for name in args.names:
        if name not in known:
            raise UserError(f"no recipe {name!r} in {RECIPES.name}; there are {', '.join(known)}{nearest(name, known)}")
    if args.check:
        if found := problems():
            raise UserError(f"{'; '.join(found)}: run python tools/digits_table.py --train")
        return
    for name in args.names or known:
        if args.train:
            train(parse_train_args(["--config", str(known[name]), "--output", str(args.runs), "--overwrite"]))
        results = read_results() | {name: figures(known[name], args.runs)}
        results = {name: results[name] for name in known if name in results}
        # After every run: a later one that fails does not take the figures of the earlier ones along.
        write_text(RECIPES / "results.json", json.dumps(results, indent=1, sort_keys=True) + "\n")
        write_text(RECIPES / "README.md", page(results))
        f = results[name]
        print(f"{name}: {f['best_top1']:.1f} % best, {f['last_top1']:.1f} % last, {duration(f['seconds'])}")
