"""Commands in the documentation exist and take the flags that they are shown with; every command explains itself."""

import contextlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from visattn_tools import (
    averaging,
    benchmark,
    compute_points,
    conversion,
    flags,
    hub,
    loader_benchmark,
    prediction,
    shapes,
    shards,
    sparsity,
    validation_flags,
    visualization,
)
from visattn_tools.cli import Parser, UserError

ROOT = Path(__file__).resolve().parents[2]
PARSERS: dict[str, Callable[[], Parser]] = {
    "average": averaging.average_parser,
    "benchmark": benchmark.parser,
    "compute_points": compute_points.compute_points_parser,
    "convert": conversion.convert_parser,
    "loader_benchmark": loader_benchmark.loader_benchmark_parser,
    "make_shards": shards.make_shards_parser,
    "make_shapes": shapes.make_shapes_parser,
    "predict": prediction.predict_parser,
    "push_to_hub": hub.push_to_hub_parser,
    "sparsity": sparsity.sparsity_parser,
    "train": flags.train_parser,
    "validate": validation_flags.validate_parser,
    "visualize": visualization.visualize_parser,
}


def _parse(name: str, words: Sequence[str]) -> None:
    if name == "loader_benchmark":  # what is not its own is train.py's
        _, words = PARSERS[name]().parse_known_args(words)
        name = "train"
    PARSERS[name]().parse(words)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Name and arguments of every ``tools/NAME.py`` that a page calls, without comments."""
    pattern = r"(?:python|torchrun [^`\n]*?)\s+tools/(\w+)\.py([^`\n#]*)"
    return [(name, shlex.split(rest)) for name, rest in re.findall(pattern, text.replace("\\\n", " "))]


def _documented() -> list[tuple[str, str, list[str]]]:
    folders = (ROOT / "configs", ROOT / "model_cards")
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(page for folder in folders for page in sorted(folder.rglob("*.md"))),
    ]
    return [
        (page.relative_to(ROOT).as_posix(), name, words)
        for page in pages
        for name, words in commands(page.read_text(encoding="utf-8"))
    ]


DOCUMENTED = _documented()


@pytest.mark.parametrize(("page", "name", "words"), DOCUMENTED, ids=[name for _, name, _ in DOCUMENTED])
def test_documented_commands_have_these_flags(page: str, name: str, words: list[str]) -> None:
    assert (ROOT / "tools" / f"{name}.py").is_file(), f"{page} calls tools/{name}.py"
    if name in PARSERS:
        _parse(name, words)


def test_the_readme_shows_the_commands() -> None:
    shown = {name for page, name, _ in DOCUMENTED if page == "README.md"}
    assert {
        "train",
        "validate",
        "predict",
        "convert",
        "average",
        "benchmark",
        "loader_benchmark",
        "push_to_hub",
    } <= shown


def test_the_search_finds_commands_and_mistakes() -> None:
    page = "`python tools/train.py --model x`\n"
    page += "```\ntorchrun --nproc-per-node 2 tools/train.py --lr 1 \\\n --opt a # why\n```"
    assert commands(page) == [("train", ["--model", "x"]), ("train", ["--lr", "1", "--opt", "a"])]
    with pytest.raises(UserError, match="unknown argument --optt"):
        _parse("loader_benchmark", ["--images", "20", "--optt", "sgd"])


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse fills in defaults when it prints, so a stray per-cent sign shows itself only here."""
    with contextlib.suppress(SystemExit):
        PARSERS[name]().parse(["--help"])
    assert f"usage: {name}.py" in capsys.readouterr().out
