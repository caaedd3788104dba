"""The engine on a GPU: mixed precision with and without a scaler, and losses that are asked about without waiting."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from visattn_tools import engine, training
from visattn_tools.checkpoint import load_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Flags = Callable[..., list[str]]
SHORT = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "4", "--device", "cuda", "--clip-grad", "1"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(flags: Flags, tmp_path: Path, dtype: str) -> None:
    more = ["--amp", "--amp-dtype", dtype, "--channels-last", "--model-ema", "--mixup", "0.2", "--reprob", "0.5"]
    training.main(flags("run", *SHORT, *more))
    folder = tmp_path / "runs/run/checkpoints"
    state = load_state(folder / "state.pt")
    assert (state["epoch"], state["bad_batches"]) == (2, 0)
    assert bool(state["scaler"]) == (dtype == "float16")
    assert all(torch.isfinite(value).all() for value in load_file(folder / "last.safetensors").values())
    training.main(flags("run", *SHORT, *more, "--epochs", 3, "--resume", "auto"))
    assert load_state(folder / "state.pt")["epoch"] == 3


def test_an_update_with_a_bad_loss_is_left_out(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = engine.Engine._step, 0

    def step(self: engine.Engine, images: torch.Tensor, *rest: object) -> torch.Tensor | None:
        nonlocal count
        count += 1
        return original(self, images * float("nan") if count == 3 else images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.Engine, "_step", step)
    training.main(flags("run", *SHORT))
    state = load_state(tmp_path / "runs/run/checkpoints/state.pt")
    assert (state["bad_batches"], state["updates"]) == (1, 8)
    assert all(torch.isfinite(value).all() for value in state["model"].values())
