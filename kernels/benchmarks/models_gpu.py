"""Whole models on a GPU: images per second of inference and of a training step, ours beside others, in one run.

    python kernels/benchmarks/models_gpu.py biformer_s biformer_s:reference biformer_s::reduce-overhead convnext_tiny

A model is ``name[:backend[:mode]]``: a timm name, one of our backends (empty: the automatic choice), and a mode of
``torch.compile`` (empty: eager; ``default`` or ``reduce-overhead``, which replays CUDA graphs). bfloat16 autocast,
channels_last, images of the model's own size that lie on the device; a training step is forward, cross-entropy,
backward and fused AdamW. Medians of ``triton.testing.do_bench``.
"""

import argparse
import datetime
import sys
import time
from typing import Any

import timm
import torch
import torch.nn.functional as F
import triton
from comparison import command, write
from comparison.gpu import median_ms
from comparison.tables import model_table
from visattn_kernels import use_backend

import visattn  # noqa: F401  registers the models


def measure(spec: str, batch: int) -> dict[str, Any]:
    """Images per second of one model."""
    name, backend, mode = (*spec.split(":"), "", "")[:3]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = timm.create_model(name).cuda().to(memory_format=torch.channels_last)
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(batch, *size, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, model.num_classes, (batch,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model, mode=mode) if mode else model

    def infer() -> None:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            run(images)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    row: dict[str, Any] = {"model": name, "backend": backend or "auto", "mode": mode or "eager"}
    row |= {"size": size[-1], "batch": batch}
    with use_backend(backend or None):
        for label, call in (("inference", infer), ("training", step)):
            model.train(label == "training")
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            row[f"{label}_first_s"] = time.perf_counter() - start
            ms = median_ms(call, 800)
            row |= {f"{label}_ms": ms, f"{label}_images_per_s": 1e3 * batch / ms}
            torch.cuda.reset_peak_memory_stats()
            call()
            row[f"{label}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def main() -> None:
    """Parse the flags, measure all models, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="name[:backend[:mode]]")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device; this script measures on one")
    about = {
        "command": command(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timm": timm.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(about)
    rows: list[dict[str, Any]] = []
    for spec in args.models:
        rows.append(measure(spec, args.batch_size))
        print(model_table(rows[-1:]).splitlines()[-1], flush=True)
        if args.json:  # after every model: a long run that is stopped leaves what it has
            write(args.json, about, rows)
    print(f"\n{model_table(rows)}")


if __name__ == "__main__":
    main()
