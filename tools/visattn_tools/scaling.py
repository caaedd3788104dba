"""``tools/scaling.py``: what training on many images needs, from what the loader was measured to cost.

``configs/scaling.json`` holds the measurements of ``tools/loader_benchmark.py`` and, apart from them, what is assumed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli import Parser, UserError
from .files import write_text

ROOT = Path(__file__).parents[2]
START, END = "<!-- tables: written by tools/scaling.py -->", "<!-- /tables -->"


@dataclass
class Needs:
    """What a plan needs, and what comes of it.

    Attributes:
        terabytes: Of all images.
        shards: Files of the size that is assumed.
        images_per_shard: In each of them.
        cores_per_gpu: Loader processes, a core each, that keep a GPU busy, reserve included.
        utilisation: Share of the time that a GPU computes, with the cores that a machine has.
        mb_per_second: What a machine reads at that speed.
        buffers_gb: Memory of a machine for the images among which its loader processes shuffle.
        epoch_hours: Of all GPUs together.
        hours: Of all epochs.
    """

    terabytes: float
    shards: int
    images_per_shard: int
    cores_per_gpu: float
    utilisation: float
    mb_per_second: float
    buffers_gb: float
    epoch_hours: float
    hours: float


def needs(plan: dict[str, Any], cpu_ms: float, gpu_speed: float, assumed: dict[str, Any]) -> Needs:
    """Work a plan out.

    Args:
        plan: ``images``, ``bytes_per_image``, ``gpus``, ``epochs``.
        cpu_ms: Processor time of the loader per image.
        gpu_speed: Images per second that a GPU trains.
        assumed: ``cores_per_machine``, ``gpus_per_machine``, ``shard_megabytes``, ``shuffled_images`` of a process,
            ``reserve``.
    """
    cores = assumed["cores_per_machine"] / assumed["gpus_per_machine"]
    wanted = gpu_speed * cpu_ms / 1e3 * assumed["reserve"]
    utilisation = min(cores / wanted, 1.0)
    speed = gpu_speed * utilisation
    processes = math.ceil(min(wanted, cores)) * assumed["gpus_per_machine"]
    epoch = plan["images"] / (plan["gpus"] * speed) / 3600
    per_shard = int(assumed["shard_megabytes"] * 1e6 / plan["bytes_per_image"])
    return Needs(
        terabytes=plan["images"] * plan["bytes_per_image"] / 1e12,
        shards=math.ceil(plan["images"] / per_shard),
        images_per_shard=per_shard,
        cores_per_gpu=wanted,
        utilisation=utilisation,
        mb_per_second=speed * assumed["gpus_per_machine"] * plan["bytes_per_image"] / 1e6,
        buffers_gb=processes * assumed["shuffled_images"] * plan["bytes_per_image"] / 1e9,
        epoch_hours=epoch,
        hours=epoch * plan["epochs"],
    )


def _cost(measured: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """The measurement that a plan rests on: its storage and flags, with the most loader processes.

    Raises:
        UserError: There is none.
    """
    wanted = plan["measured"]
    rows = [row for row in measured if all(row[key] == value for key, value in wanted.items()) and row["workers"]]
    if not rows:
        raise UserError(f"no measurement with loader processes is that of {plan['name']}: {wanted}")
    return max(rows, key=lambda row: row["workers"])


def tables(facts: dict[str, Any]) -> str:
    """The measurements and the plans as Markdown."""
    lines = [
        "| JPEGs | flags | storage | processes | images/s | processor ms an image | measured |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in facts["measured"]:
        size = f"{'x'.join(map(str, row['size']))}, {row['bytes_per_image'] / 1e3:.0f} kB"
        flags = " ".join(row["flags"]) or "none"
        where = f"{row['date']}, {row['hardware']}, load {row['load_before']}"
        lines.append(
            f"| {size} | `{flags}` | {row['kind']} | {row['workers']} | {row['images_per_second']:.0f} "
            f"| {row['cpu_ms_per_image']:.2f} | {where} |"
        )
    lines += [
        "",
        "| plan | images | TB | shards | images in each | GPUs | images/s each | loader processes per GPU | GPU busy "
        "| MB/s per machine | buffers (GB) | minutes per epoch | epochs | hours in all |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in facts["plans"]:
        cost = _cost(facts["measured"], plan)
        plan = plan | {"bytes_per_image": plan["bytes_per_image"] or cost["bytes_per_image"]}
        for gpu in facts["gpus"]:
            n = needs(plan, cost["cpu_ms_per_image"], gpu["images_per_second"], facts["assumed"])
            lines.append(
                f"| {plan['name']} | {plan['images']:,} | {n.terabytes:.2f} | {n.shards:,} | {n.images_per_shard:,} "
                f"| {plan['gpus']} | {gpu['images_per_second']:,} | {n.cores_per_gpu:.1f} | {n.utilisation:.0%} "
                f"| {n.mb_per_second:,.0f} | {n.buffers_gb:.0f} | {60 * n.epoch_hours:.1f} "
                f"| {plan['epochs']} | {n.hours:.1f} |"
            )
    return "\n".join(lines)


def page() -> tuple[Path, str]:
    """``configs/SCALING.md`` and what it should say.

    Raises:
        UserError: It has no place for the tables.
    """
    path = ROOT / "configs" / "SCALING.md"
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UserError(f"configs/SCALING.md has no place for the tables: a line {START!r} and a line {END!r}")
    facts = json.loads((ROOT / "configs" / "scaling.json").read_text(encoding="utf-8"))
    before, rest = text.split(START, 1)
    return path, f"{before}{START}\n{tables(facts)}\n{END}{rest.split(END, 1)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    """``tools/scaling.py``: take in measurements and rewrite the page; with ``--check`` only say if it is out of date.

    Raises:
        UserError: With ``--check``, a page that differs from what the figures say; files that are no measurements.
    """
    parser = Parser(prog="scaling.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is out of date")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="FILE", help="of tools/loader_benchmark.py, in place of those there"
    )
    args = parser.parse(argv)
    if args.results:
        _take_in(args.results)
    path, text = page()
    if args.check and path.read_text(encoding="utf-8") != text:
        raise UserError("out of date: configs/SCALING.md; run python tools/scaling.py")
    if not args.check:
        write_text(path, text)
        print(f"wrote {path.relative_to(ROOT)}")


def _take_in(files: list[Path]) -> None:
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += json.loads(file.read_text(encoding="utf-8"))
            assert all("cpu_ms_per_image" in row for row in rows)
        except OSError as error:
            raise UserError(f"--results {file}: {error.strerror}") from None
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"--results {file} is none of tools/loader_benchmark.py: {error}") from None
    path = ROOT / "configs" / "scaling.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(facts | {"measured": rows}, indent=1) + "\n")
