"""DaViT on a CPU: ours against timm's, with the same weights, in one process. Prints a table, optionally writes JSON.

    python kernels/benchmarks/davit_cpu.py --batch-size 4 --json davit_cpu.json

Time is per image. Peak memory is what torch's allocator has handed out at most during one call. Ratios are timm's
figure over ours: above 1, ours is the better one.
"""

import argparse
import statistics
from typing import Any

import timm
import torch
from comparison import about_cpu, compare, write

import visattn  # noqa: F401  registers the models


def main() -> None:
    """Parse the flags, run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["davit_tiny:davit_t"], help="pairs of timm's name and ours")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 256], help="sides of the images")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    print(f"{'':34s} {'timm ms':>9s} {'ours ms':>9s} {'ratio':>7s} {'timm MiB':>9s} {'ours MiB':>9s} {'ratio':>7s}")
    for pair in args.models:
        names = pair.split(":")
        theirs, ours = (timm.create_model(name) for name in names)
        ours.load_state_dict(theirs.state_dict())
        for size in args.sizes:
            x = torch.randn(args.batch_size, 3, size, size)
            with torch.no_grad():
                torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)
            for backward in (False, True):
                mode = "forward + backward" if backward else "forward"
                row = compare(theirs.train(backward), ours.train(backward), x, backward, args.repeat)
                name = f"`{names[1]}`, {size} px" if len(args.models) > 1 else f"{size} px"
                results.append({"name": name, "mode": mode, **row})
                print(
                    f"{f'{names[1]} {size} px {mode}':34s} {row['theirs_ms']:9.1f} {row['ours_ms']:9.1f}"
                    f" {row['time_ratio']:6.2f}x {row['theirs_mib']:9.1f} {row['ours_mib']:9.1f}"
                    f" {row['memory_ratio']:6.2f}x",
                    flush=True,
                )
    mean = statistics.geometric_mean([row["time_ratio"] for row in results])
    print(f"geometric mean of the time ratios: {mean:.3f}x")
    if args.json:
        write(args.json, about_cpu(args) | {"geometric_mean": mean}, results)


if __name__ == "__main__":
    main()
