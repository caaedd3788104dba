"""Neighborhood attention on a CPU: ours against torch's FlexAttention without compilation. Prints a table.

    python kernels/benchmarks/neighborhood_cpu.py --batch-size 1 --json neighborhood_cpu.json

FlexAttention, which NATTEN uses without its CUDA library, gets its inputs heads first and the mask of all pairs ready
made; neither is timed. It has no gradients on a CPU, so training has our time only. Both sides run in turns and the
fastest of the repetitions counts; time is per image, peak memory what torch's allocator hands out during one call.
"""

import argparse
import time
import warnings
from typing import Any

import torch
from comparison import about_cpu, caller, compare, peak_bytes, write
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from visattn_kernels import neighborhood_attention
from visattn_kernels.neighborhood.reference import axis_windows

# Side of the map, heads, kernel size, dilation: the layers of NAT-T and DiNAT-T at 224 px, and a large kernel.
LAYERS = [
    (56, 2, 7, 1),
    (28, 4, 7, 1),
    (14, 8, 7, 1),
    (56, 2, 7, 8),
    (28, 4, 7, 4),
    (14, 8, 7, 2),
    (56, 2, 13, 1),
]
DIM = 32


def visible(side: int, kernel_size: int, dilation: int) -> Tensor:
    """Which token of a square map sees which, (side ** 2, side ** 2)."""
    axis = axis_windows(side, kernel_size, 1, dilation, False, 2, torch.device("cpu"))
    seen = torch.zeros(side, side, dtype=torch.bool)
    for block, queries in enumerate(axis.queries):
        for b, i in enumerate(queries.tolist()):
            first = i % dilation + dilation * int(axis.first[block, b])
            seen[i, first : first + dilation * kernel_size : dilation] = True
    return (seen[:, None, :, None] & seen[None, :, None, :]).reshape(side**2, side**2)


class Flex(nn.Module):
    """Queries, keys and values (B, 3, heads, tokens, dim) through FlexAttention."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(self.mask[i, j], score, -float("inf"))

        q, k, v = x.unbind(1)
        return flex_attention(q, k, v, score_mod=score_mod)


class Ours(nn.Module):
    """The same tensors, viewed as maps with heads last."""

    def __init__(self, side: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.side, self.kernel_size, self.dilation = side, kernel_size, dilation

    def forward(self, x: Tensor) -> Tensor:
        maps = x.unflatten(3, (self.side, self.side)).permute(0, 1, 3, 4, 2, 5)
        q, k, v = maps.unbind(1)
        out = neighborhood_attention(q, k, v, self.kernel_size, dilation=self.dilation)
        return out.flatten(1, 2).transpose(1, 2)


def main() -> None:
    """Parse the flags, run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    print(f"{'':44s} {'flex ms':>9s} {'ours ms':>9s} {'':8s} {'flex MiB':>9s} {'ours MiB':>9s} {'':8s} {'f+b ms':>8s}")
    for side, heads, kernel_size, dilation in LAYERS:
        theirs, ours = Flex(visible(side, kernel_size, dilation)), Ours(side, kernel_size, dilation)
        x = torch.randn(args.batch_size, 3, heads, side**2, DIM)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        row = compare(theirs, ours, x, False, args.repeat)
        call, times = caller(ours, x.requires_grad_(), True), []
        for _ in range(args.repeat + 1):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        row |= {"training_ms": 1e3 * min(times[1:]) / args.batch_size, "training_mib": peak_bytes(call) / 2**20}
        name = f"{side}x{side}, {heads} heads, kernel {kernel_size}, dilation {dilation}"
        results.append({"name": name, **row})
        print(
            f"{name:44s} {row['theirs_ms']:9.1f} {row['ours_ms']:9.1f} {row['time_ratio']:7.1f}x"
            f" {row['theirs_mib']:9.1f} {row['ours_mib']:9.1f} {row['memory_ratio']:7.1f}x {row['training_ms']:8.1f}",
            flush=True,
        )
    if args.json:
        write(args.json, about_cpu(args), results)


if __name__ == "__main__":
    main()
