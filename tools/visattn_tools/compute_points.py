"""``tools/compute_points.py``: what a LookupViT costs by its compressed grid, beside a ViT of the same size."""

import argparse
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from visattn.models.lookupvit import LookupViT

from .cli import Parser, UserError, number
from .config import check_device, check_model_name
from .measuring import counts, hardware, peak_memory, take_turns
from .results import add_results, read_results, stamp

PEERS = {
    "lookupvit_t16": "vit_tiny_patch16_224",
    "lookupvit_s16": "vit_small_patch16_224",
    "lookupvit_b16": "vit_base_patch16_224",
    "lookupvit_l16": "vit_large_patch16_224",
}
"""timm's ViT of the same width, depth and heads."""


def _size(text: str) -> tuple[int, int]:
    """``5`` or ``5x7``."""
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no grid; expected a number for a square, or HxW such as 5x7")
    sides = [int(side) for side in text.split("x")]
    return sides[0], sides[-1]


def compute_points_parser() -> Parser:
    """The parser of ``tools/compute_points.py``."""
    parser = Parser(prog="compute_points.py", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a LookupViT")
    add("--sizes", nargs="+", type=_size, default=[(n, n) for n in (3, 5, 7, 10)], metavar="N", help="N or HxW")
    add("--peer", metavar="MODEL", help="timm model to compare with; default: the ViT of the same size")
    add("--img-size", type=number(int, 16, 4096), default=224, help="side of the images")
    add("-b", "--batch-size", type=number(int, 1), default=8, help="images per step")
    add("--rounds", type=number(int, 3), default=10, help="timed rounds; all take turns in every round")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--output", type=Path, metavar="FILE", help="JSON of the results; all else in it stays")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/compute_points.py``."""
    args: argparse.Namespace = compute_points_parser().parse(argv)
    check_device(args.device)
    check_model_name(args.model)
    args.peer = args.peer or PEERS.get(args.model)
    if args.peer is None:
        raise UserError(f"{args.model} has no peer of its own: give --peer, a timm model that takes --img-size")
    check_model_name(args.peer)
    read_results(args.output)  # a file that is none of ours is refused before the work
    figures = measure(args)
    print("\n".join(table(args.model, figures)))
    if args.output:
        add_results(args.output, [{"model": args.model, "bench": "compute_points", **figures, **stamp(args.device)}])


def _create(name: str, args: argparse.Namespace, device: str) -> Any:
    try:
        return timm.create_model(name, img_size=args.img_size, device=device).eval()
    except TypeError as error:
        raise UserError(f"{name} cannot be made for --img-size {args.img_size}: {error}") from error


def _checked(args: argparse.Namespace, device: str) -> tuple[LookupViT, nn.Module]:
    """The LookupViT and its peer."""
    model = _create(args.model, args, device)
    if not isinstance(model, LookupViT):
        raise UserError(f"{args.model} is no LookupViT")
    try:
        for size in args.sizes:
            model.set_compressed_size(size)
    except ValueError as error:
        raise UserError(f"--sizes: {error}") from error
    return model, _create(args.peer, args, device)


def _step(model: nn.Module, x: Tensor, amp: bool, size: tuple[int, int] | None = None) -> Callable[[], None]:
    def step() -> None:
        if isinstance(model, LookupViT) and size:
            model.set_compressed_size(size)
        with torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp):
            model(x)

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """GMACs, images per second and memory of the peer, then of every compressed grid.

    Everything runs in one process and takes turns, so that a slow spell of the machine meets all; the ratio is the
    median of those within a round.
    """
    load = os.getloadavg()[0]
    counted, counted_peer = _checked(args, "meta")
    channels = counted.in_chans
    macs = {"peer": counts(counted_peer, (channels, args.img_size, args.img_size))["gmacs"]}
    model, peer = _checked(args, args.device)
    x = torch.randn(args.batch_size, channels, args.img_size, args.img_size, device=args.device)
    steps = {"peer": _step(peer, x, args.amp)}
    for size in args.sizes:
        label = f"{size[0]}x{size[1]}"
        counted.set_compressed_size(size)
        macs[label] = counts(counted, (channels, args.img_size, args.img_size))["gmacs"]
        steps[label] = _step(model, x, args.amp, size)
    times = take_turns(steps, args.rounds, args.device)
    points = []
    for label, step in steps.items():
        owner = peer if label == "peer" else model
        ratios = [theirs / ours for theirs, ours in zip(times["peer"], times[label])]
        point = {
            "compressed": label,
            "gmacs": macs[label],
            "images_per_second": round(args.batch_size / statistics.median(times[label]), 2),
            "ratio_to_peer": round(statistics.median(ratios), 2),
            "weights_mib": round(sum(p.numel() * p.element_size() for p in owner.parameters()) / 2**20, 1),
            "activations_mib": round(peak_memory(step, args.device) / 2**20, 1),
        }
        points.append(point)
    return {
        "peer": args.peer,
        "points": points,
        "hardware": hardware(args.device),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "batch_size": args.batch_size,
        "img_size": args.img_size,
        "dtype": "bfloat16 autocast" if args.amp else "float32",
        "rounds": args.rounds,
    }


def table(name: str, figures: dict[str, Any]) -> Iterator[str]:
    """Lines of a table of what :func:`measure` found."""
    about = ("hardware", "threads", "load_before", "batch_size", "img_size", "dtype", "rounds")
    yield f"{name} beside {figures['peer']}: " + ", ".join(f"{key} {figures[key]}" for key in about)
    yield f"{'compressed':<12}{'GMACs':>8}{'images/s':>10}{'times peer':>12}{'weights MiB':>13}{'activations MiB':>17}"
    for f in figures["points"]:
        yield (
            f"{f['compressed']:<12}{f['gmacs']:>8.2f}{f['images_per_second']:>10.2f}{f['ratio_to_peer']:>12.2f}"
            f"{f['weights_mib']:>13.1f}{f['activations_mib']:>17.1f}"
        )
