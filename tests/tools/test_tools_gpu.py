"""What measures and tests models, on a GPU."""

import json
from pathlib import Path

import pytest
import torch
from small_models import save_small
from visattn_tools import averaging, benchmark, prediction, validation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FAST = ["--device", "cuda", "--amp", "--channels-last"]


def test_validation_and_prediction_agree_with_the_cpu(image_folder: Path, tmp_path: Path) -> None:
    weights, target = save_small(tmp_path / "weights.safetensors"), tmp_path / "results.json"
    losses = []
    for flags in (["--device", "cpu"], ["--device", "cuda"], FAST, [*FAST, "--amp-dtype", "float16"]):
        data = ["--data-dir", str(image_folder), "--workers", "2", "--json", str(target)]
        validation.main([str(weights), *data, *flags])
        losses.append(json.loads(target.read_text())[0]["loss"])
        prediction.main(["--checkpoint", str(weights), str(image_folder / "val"), *flags, "--json", str(target)])
        assert len(json.loads(target.read_text())) == 9
    assert losses == pytest.approx([losses[0]] * 4, rel=0.05)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_greedy_soup(image_folder: Path, tmp_path: Path) -> None:
    files = [str(save_small(tmp_path / f"{i}.safetensors")) for i in range(2)]
    target = tmp_path / "soup.safetensors"
    flags = ["--method", "greedy", "--data-dir", str(image_folder), "--workers", "0", "--output", str(target)]
    averaging.main([*files, *flags, *FAST])
    assert target.exists()


@pytest.mark.parametrize("bench", ["inference", "training", "profile", "engine"])
def test_benchmark(bench: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    flags = ["--bench", bench, "--rounds", "3", "--steps", "2", "-b", "4", "--output", str(path)]
    benchmark.main(["test_resnet", "test_efficientnet", "--img-size", "64", *flags, *FAST])
    figures = next(record for record in json.loads(path.read_text()) if record["model"] == "test_resnet")
    assert figures["bench"] == bench
    assert torch.cuda.get_device_name() == figures["hardware"]
    if bench == "profile":
        names = [row["operator"] for row in figures["training_operators"]]
        assert not any(name.startswith(("aten::", "Optimizer.")) for name in names), "kernels, not what launches them"
        assert figures["training_memory_mib"] > figures["inference_memory_mib"]
    else:
        assert figures["images_per_second"] > 0
