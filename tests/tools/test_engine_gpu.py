"""The engine on a GPU: mixed precision with and without a scaler, and losses that are asked about without waiting."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import exit_codes
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--sync-bn", "--model", "test_resnet"]], ids=["ddp", "fsdp", "sync"])
def test_two_gpus(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    """As one with twice the batch; batch norms see the whole batch only with --sync-bn, so the model has none else."""
    # Of six values a norm makes much of the rounding of tf32, which depends on the batch.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    plain = ["--model", "test_vit", "--model-kwargs", "img_size=32"] if "--model" not in more else []
    common = [*SHORT, *plain, "--opt", "sgd", "--lr", "0.05", *(flag for flag in more if flag != "--fsdp")]
    training.main(flags("one", *common, "--batch-size", 6))
    two = ["--batch-size", 3, *(["--fsdp"] if "--fsdp" in more else [])]
    assert exit_codes(flags("two", *common, *two), processes=2) == [0, 0]
    one, other = (load_file(tmp_path / f"runs/{name}/checkpoints/last.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - other[key]).abs().max()) for key in one if one[key].is_floating_point()) < 1e-3
