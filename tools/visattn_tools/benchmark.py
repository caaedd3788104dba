"""Measure models: parameters and MACs, time per image beside peers in the same run, operators, the engine's share."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import list_optimizers
from timm.utils import ParseKwargs
from visattn_kernels.backend import BACKENDS

import visattn

from .cli import Interrupted, Parser, UserError, nearest, number
from .config import check_device
from .conversion import create
from .engine_benchmark import measure_engine
from .files import write_text
from .measuring import counts, hardware
from .peers import peer_of
from .profiling import profile_model
from .results import Record, add_results, identity, read_results, stamp
from .rows import csv_text
from .speed import (
    AUTO,
    CPU_BATCH,
    GPU_BATCH,
    MOST_STEPS,
    Contestant,
    Group,
    Subject,
    at_size,
    first_line,
    groups,
    input_size,
    measure,
)
from .validation_flags import add_computation_flags

BENCHES = ("count", "inference", "training", "profile", "engine")


def parser() -> Parser:
    """The parser of ``tools/benchmark.py``."""
    out = Parser(prog="benchmark.py", description=__doc__)
    add = out.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="visattn or timm models, wildcards, or families such as biformer; default: all of visattn",
    )
    add(
        "--bench",
        choices=BENCHES,
        default="count",
        help="count: parameters, MACs, activations; inference; training: forward, loss, backward, optimizer; profile: "
        "operators by time, memory, parts; engine: tools/train.py's loop beside a bare one",
    )
    add(
        "--peer",
        metavar="MODEL",
        help="what the ratios are to; auto: timm's own version of a model, else a plain model of timm of equal MACs; "
        "default: the first MODEL, or with several --backends the first of them",
    )
    add(
        "--backends",
        nargs="+",
        choices=(AUTO, *BACKENDS),
        default=[AUTO],
        help="of the operators, beside each other; auto: the operators choose, which is what users get",
    )
    add("--output", type=Path, metavar="FILE", help="JSON of the results, written as they come; all else in it stays")
    add("--resume", action="store_true", help="leave out what --output holds of today from this hardware")
    add("--csv", type=Path, metavar="FILE", help="the results as CSV")
    add("--img-size", type=number(int, 16, 4096), help="side of the images; default: each model's")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="of all models")
    add("--no-retry", action="store_true", help="too little memory for --batch-size is an error")
    add("--grad-checkpointing", action="store_true", help="recompute activations in training")
    add("--opt", default="adamw", metavar="NAME", help="optimizer of training, any of timm's")
    add("--rounds", type=number(int, 3), default=10, help="timed rounds; models take turns in every round")
    add(
        "--steps",
        type=number(int, 1),
        help=f"steps of a turn; default: 1, on a GPU up to {MOST_STEPS} by their time, with --bench engine 20 and 50",
    )
    add("--workers", type=number(int, 0, 1024), metavar="N", help="engine: measure with a loader of N processes, too")
    add("--top", type=number(int, 1), default=12, help="profile: operators listed")
    add("--trace", type=Path, metavar="FILE", help="profile: Chrome trace of the last model's steps, as JSON")
    # By default 8; on a GPU 128, with --bench inference and training halved for models that fill it with fewer images.
    add_computation_flags(out, batch_size=None)
    return out


def count(name: str, img_size: int | None = None, model_args: dict[str, Any] | None = None) -> Record:
    """Parameters; GMACs of one image, half the FLOPs of convs and matrix products by torch's counter; activations."""
    model: Any = create(name, None, {"device": "meta", **(model_args or {})})
    size = input_size(name, img_size)
    return {"input_size": list(size), "params": sum(p.numel() for p in model.parameters()), **counts(model, size)}


def _models(args: argparse.Namespace) -> list[str]:
    known, own = timm.list_models(), [name for name in visattn.list_models() if not name.startswith("test_")]
    names: list[str] = []
    for word in args.models:
        family = [name for name in timm.list_models(module=word) if name in own]
        found = family or (timm.list_models(word) if set(word) & set("*?[") else [word] if timm.is_model(word) else [])
        if not found:
            raise UserError(f"unknown model {word!r}{nearest(word, known)}")
        names += [name for name in found if name not in names]
    if args.peer and args.peer != AUTO and not timm.is_model(args.peer):
        raise UserError(f"unknown model {args.peer!r}{nearest(args.peer, known)}")
    return names or own


def main(argv: Sequence[str] | None) -> None:
    """``tools/benchmark.py``.

    Raises:
        UserError: An unknown model, a result file that is none, or after all others models that cannot be measured.
    """
    args = parser().parse(argv)
    check_device(args.device)
    args.models = _models(args)
    if args.opt.lower() not in list_optimizers():
        raise UserError(f"--opt {args.opt}: timm has no such optimizer{nearest(args.opt, map(str, list_optimizers()))}")
    for path in (args.output, args.csv, args.trace):
        if path and not path.parent.is_dir():
            raise UserError(f"{path}: no folder {path.parent}")
    if args.resume and not args.output:
        raise UserError("--resume goes on with the file of --output; give both")
    about = _about(args)
    done = [r for r in read_results(args.output) if r.get("date") == date.today().isoformat()] if args.resume else []
    made: dict[tuple[str, ...], Record] = {}
    failures: list[str] = []
    print(", ".join(f"{key} {value}" for key, value in about.items() if value not in ("", False)), flush=True)
    about |= stamp(args.device) | {"command": _command(sys.argv[1:] if argv is None else argv)}
    for new, failed in _measured(args, about, {identity(record) for record in done}):
        records = [{"model": record["model"], "bench": args.bench, **record, **about} for record in new]
        failures += failed
        for line in failed:
            print(f"failed: {line}", flush=True)
        made |= {identity(record): record for record in records}
        if args.output:
            add_results(args.output, records)
        if args.csv:
            write_text(args.csv, csv_text(list(made.values())))
    if failures:
        raise UserError(f"{len(failures)} could not be measured:\n" + "\n".join(failures))


def _about(args: argparse.Namespace) -> Record:
    """What all records of a run share, and, but for counts, how it was computed."""
    if args.bench == "count":
        return {}
    about: Record = {
        "hardware": hardware(args.device),
        "threads": torch.get_num_threads(),
        "dtype": f"{args.amp_dtype} autocast" if args.amp else "float32",
        "channels_last": args.channels_last,
        "compiled": f"{args.torchcompile} {args.torchcompile_mode or ''}".strip() if args.torchcompile else "",
    }
    if args.bench != "inference":
        about |= {"opt": args.opt, "grad_checkpointing": args.grad_checkpointing}
    return about


def _command(words: Sequence[str]) -> str:
    """The command without the places of its files."""
    out: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--output", "--csv", "--trace"):
            next(rest)
        elif word != "--resume" and not word.startswith(("--output=", "--csv=", "--trace=")):
            out.append(word)
    return shlex.join(["python", "tools/benchmark.py", *out])


def _measured(
    args: argparse.Namespace, about: Record, done: set[tuple[str, ...]]
) -> Iterator[tuple[list[Record], list[str]]]:
    """Records as they come, and a line per model that could not be measured; not those that are done."""

    def is_done(name: str, backend: str | None) -> bool:
        record = {"model": name, "bench": args.bench, "input_size": list(input_size(name, args.img_size)), **about}
        return identity(record | ({"backend": backend} if backend else {})) in done

    if args.bench in ("inference", "training"):
        for group in groups(args):
            members = [who for who in group.members if not is_done(who.name, who.backend)]
            if members:
                records, failed = measure(Group(members, group.peer, group.gmacs), args)
                for record in records:
                    _print_speed(record)
                yield records, failed
        return
    gpu = args.device.startswith("cuda")
    args.batch_size = args.batch_size or (GPU_BATCH if gpu else CPU_BATCH)
    args.steps = args.steps or (50 if gpu else 20)
    bench = {"count": _count, "profile": _profile, "engine": measure_engine}[args.bench]
    for name in args.models:
        if is_done(name, None):
            continue
        base = {"model": name, "input_size": list(input_size(name, args.img_size))}
        try:
            record = bench(name, args)
        except Interrupted:
            raise
        except Exception as error:  # one bad model does not lose the others
            yield [], [f"{name}: {first_line(error)}"]
        else:
            yield [base | record], []


def _print_speed(record: Record) -> None:
    low, high = record["step_ms_quartiles"]
    who = Contestant(record["model"], tuple(record["input_size"]), record["backend"])
    ratio = f"{record['ratio_to_peer']:.2f}x {record['peer']}, " if "peer" in record else ""
    print(
        f"{who.label:24} {record['images_per_second']:10.2f} images/s, {ratio}{record['step_ms']:.2f} ms a step of "
        f"{record['batch_size']} [{low:.2f}, {high:.2f}], {record['step_memory_mib']:.0f} MiB in it",
        flush=True,
    )


def _count(name: str, args: argparse.Namespace) -> Record:
    record = count(name, args.img_size, args.model_kwargs)
    side = "x".join(map(str, record["input_size"][1:]))
    print(
        f"{name:24} {record['params'] / 1e6:8.2f} M parameters {record['gmacs']:9.3f} GMACs "
        f"{record['activations_m']:9.2f} M activations at {side}",
        flush=True,
    )
    peer = peer_of(name, record["gmacs"], record["input_size"]) if args.peer == AUTO else args.peer
    if peer:
        model = create(peer, None, {"device": "meta", **at_size(peer, record["input_size"])})
        record |= {"peer": peer, "peer_gmacs": counts(model, record["input_size"])["gmacs"]}
    return record


def _profile(name: str, args: argparse.Namespace) -> Record:
    who = Contestant(name, input_size(name, args.img_size))
    steps = {
        kind: Subject(who, args, args.batch_size, kind == "training", args.model_kwargs).step
        for kind in ("inference", "training")
    }
    counted = count(name, args.img_size, args.model_kwargs)
    return profile_model(counted, name, steps, args) | {"batch_size": args.batch_size}
