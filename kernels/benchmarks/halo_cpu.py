"""Halo attention on a CPU: ours against timm's, in one process. Prints a table, optionally writes JSON.

    python kernels/benchmarks/halo_cpu.py --batch-size 4 --json halo_cpu.json

Layers are those of timm's halonet_h1 and halonet50ts at 256 px, models halonet_50ts and timm's halonet50ts. Both sides
run in turns, the fastest of the repetitions counts; time is per image, peak memory what torch's allocator hands out
during one call. "Halo layers of" a network adds the times of its attention layers and takes the largest peak.
"""

import argparse
from typing import Any

import timm
import torch
from comparison import about_cpu, compare, write
from timm.layers.halo_attn import HaloAttn
from torch import nn

import visattn  # noqa: F401  registers the models
from visattn.layers import HaloAttention

# Width, heads, side of the map at 256 px, stride, and how many such layers the network has.
NETWORKS = {
    "halonet_h1": [
        (64, 8, 64, 1, 3),
        (128, 8, 64, 2, 1),
        (128, 8, 32, 1, 2),
        (256, 8, 32, 2, 1),
        (256, 8, 16, 1, 9),
        (512, 8, 16, 2, 1),
        (512, 8, 8, 1, 2),
    ],
    "halonet50ts": [(128, 4, 32, 1, 1), (256, 8, 16, 1, 3), (512, 8, 8, 1, 1)],
}


FIGURES = ("theirs_ms", "ours_ms", "theirs_mib", "ours_mib")


def report(name: str, mode: str, row: dict[str, float]) -> None:
    """One line of the table."""
    print(
        f"{name:40s} {mode:18s} {row['theirs_ms']:9.2f} {row['ours_ms']:9.2f} {row['time_ratio']:7.2f}x"
        f" {row['theirs_mib']:9.1f} {row['ours_mib']:9.1f} {row['memory_ratio']:7.2f}x",
        flush=True,
    )


def main() -> None:
    """Parse the flags, run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []

    def run(
        name: str, theirs: nn.Module, ours: nn.Module, shape: tuple[int, ...], backward: bool, single_layer: bool
    ) -> dict[str, float]:
        mode = "forward + backward" if backward else "forward"
        x = torch.randn(args.batch_size, *shape, requires_grad=backward)
        row = compare(theirs.train(backward), ours.train(backward), x, backward, args.repeat)
        report(name, mode, row)
        results.append({"name": name, "mode": mode, "single_layer": single_layer, **row})
        return row

    print(f"{'':59s} {'timm ms':>9s} {'ours ms':>9s} {'':8s} {'timm MiB':>9s} {'ours MiB':>9s}")
    for backward in (False, True):
        for network, layers in NETWORKS.items():
            total = dict.fromkeys(FIGURES, 0.0)
            for dim, heads, side, stride, count in layers:
                theirs = HaloAttn(dim, num_heads=heads, stride=stride)
                ours = HaloAttention(dim, num_heads=heads, stride=stride)
                name = f"{network}: {dim} ch, {heads} heads, {side}x{side}, stride {stride}"
                row = run(name, theirs, ours, (dim, side, side), backward, True)
                for key in total:
                    total[key] = max(total[key], row[key]) if key.endswith("mib") else total[key] + count * row[key]
            for unit, kind in (("ms", "time"), ("mib", "memory")):
                total[f"{kind}_ratio"] = total[f"theirs_{unit}"] / total[f"ours_{unit}"]
            name, mode = f"halo layers of `{network}`", results[-1]["mode"]
            report(name, mode, total)
            results.append({"name": name, "mode": mode, **total})
    for backward in (False, True):
        pair = timm.create_model("halonet50ts"), timm.create_model("halonet_50ts")
        run("whole `halonet_50ts`", *pair, (3, 256, 256), backward, False)
    if args.json:
        write(args.json, about_cpu(args), results)


if __name__ == "__main__":
    main()
