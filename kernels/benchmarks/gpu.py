"""Operators on a GPU beside their peers, in one run: a table with ratios and the distance to the lower bound, and JSON.

    python kernels/benchmarks/gpu.py bi_level_routing --shapes table --json results.json

Before anything is timed, outputs and gradients of all sides are compared: the error of ours against float32 may be
twice (gradients: three times) that of the first peer, and other peers must agree with it. Times are medians of
``triton.testing.do_bench`` as a caller sees them; "kernels" is ours as a CUDA graph, without the host's part. With
``--kernels`` all sides are timed as graphs. Ratios are the fastest peer's time over ours. The lower bound of forward is
the largest of bytes, matrix products and exponentials over what the card can do; "x" behind it is our kernels' time
over the bound.
"""

import argparse
import datetime
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from comparison import command, write
from comparison.gpu import card, extra_mb, graph_ms, median_ms, relative_error, with_gradients
from comparison.tables import WAYS, against, means, operator_table
from operators import OPERATORS, Case

NOISE = 1e-6
"""Relative error that no precision is asked to stay under."""


Function = Callable[..., torch.Tensor]


def compare(case: Case, peers: dict[str, Function], cotangent: torch.Tensor) -> dict[str, str]:
    """Peers that failed, by name, with the reason; raises where ours is not right."""
    failed: dict[str, str] = {}
    exact = with_gradients(next(iter(peers.values())), [x.float() for x in case.inputs], cotangent.float())()
    flat = [exact[0], *exact[1]]

    def errors(f: Any) -> list[float]:
        out, grads = with_gradients(f, case.inputs, cotangent)()
        return [relative_error(a, b) for a, b in zip([out, *grads], flat)]

    first, *others = peers
    plain, ours = errors(peers[first]), errors(case.ours)
    for i, (a, b) in enumerate(zip(ours, plain)):
        if a > (3 if i else 2) * b + NOISE:
            raise AssertionError(f"{case.name}: error {a:.2e} of tensor {i}, {first} has {b:.2e}")
    for name in others:
        try:
            worst = max(a / (b + NOISE) for a, b in zip(errors(peers[name]), plain))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        if worst > 10:
            failed[name] = f"disagrees: {worst:.1f} times the error of {first}"
    return failed


def measure(case: Case, chosen: list[str], kernels: bool) -> dict[str, Any]:
    """All figures of one shape; with `kernels` peers are replayed as graphs too."""
    cotangent = torch.randn_like(case.ours(*case.inputs))
    peers = {name: make() for name, make in case.peers.items() if name in chosen}
    failed = compare(case, peers, cotangent)
    limits = card()
    floor = 1e3 * max(case.bytes / limits.bytes_per_s, case.flops / limits.flops_per_s, case.exps / limits.exps_per_s)
    row: dict[str, Any] = {"shape": case.name, "floor_ms": floor, "failed": failed}
    for name, f in {"ours": case.ours, **peers}.items():
        if name in failed:
            continue
        both = with_gradients(f, case.inputs, cotangent)
        with torch.no_grad():
            row[f"{name}_fwd_ms"] = median_ms(lambda f=f: f(*case.inputs))
            row[f"{name}_fwd_mb"] = extra_mb(lambda f=f: f(*case.inputs))
        row[f"{name}_both_ms"] = median_ms(both)
        row[f"{name}_both_mb"] = extra_mb(both)
        if name != "ours" and not kernels:
            continue
        try:
            with torch.no_grad():
                row[f"{name}_fwd_kernels_ms"] = graph_ms(lambda f=f: f(*case.inputs))
            row[f"{name}_both_kernels_ms"] = graph_ms(both)
        except RuntimeError as error:  # not every peer can be captured
            if name == "ours":
                raise
            failed[f"{name} as a graph"] = str(error).splitlines()[0][:100]
    return row


def main() -> None:
    """Parse the flags, measure all shapes, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("--shapes", default="table", help="group of shapes of the operator's module (default: table)")
    parser.add_argument("--peers", nargs="+", help="peers to run (default: all)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--kernels", action="store_true", help="compare kernels alone: all sides as CUDA graphs")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device; this script measures on one")
    operator = importlib.import_module(f"operators.{args.operator}")
    if args.shapes not in operator.SHAPES:
        parser.error(f"--shapes {args.shapes}: use one of {', '.join(operator.SHAPES)}")
    about = {
        "command": command(),
        "operator": args.operator,
        "shapes": args.shapes,
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "dtype": args.dtype,
    }
    rows: list[dict[str, Any]] = []
    for shape in operator.SHAPES[args.shapes]:
        torch._dynamo.reset()  # each shape is compiled for itself
        case = operator.case(shape, getattr(torch, args.dtype))
        chosen = args.peers or list(case.peers)
        row = measure(case, chosen, args.kernels)
        rows.append(row)
        times = f"{row['ours_fwd_ms']:.3f} / {row['ours_both_ms']:.3f}"
        print(f"{row['shape']}: ours {times} ms {row['failed'] or ''}", flush=True)
        if args.json:  # after every shape: a long run that is stopped leaves what it has
            write(args.json, about, rows)
    print(f"\n{about}\n\n{operator_table(rows, 'fwd')}\n\n{operator_table(rows, 'both')}\n")
    ratios = ", ".join(f"{WAYS[way]} {value:.1f}x" for way, value in means(rows).items())
    print(f"geometric means against {against(rows)}: {ratios}")


if __name__ == "__main__":
    main()
