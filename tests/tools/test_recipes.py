"""Every committed recipe: it parses, builds its model, trains, and says what to expect where that is known."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from visattn_tools.config import parse_train_args
from visattn_tools.data import open_data
from visattn_tools.engine import Engine
from visattn_tools.model_setup import create_model, data_config_for
from visattn_tools.processes import Processes

ROOT = Path(__file__).parents[2]
IMAGENET = sorted(path.stem for path in (ROOT / "configs" / "imagenet").glob("*.yaml"))
OTHERS = sorted((ROOT / "configs").glob("finetune/*.yaml"))
REPORTED = {
    name: facts["top1"]
    for family in json.loads((ROOT / "model_cards" / "reported.json").read_text()).values()
    for name, facts in family["models"].items()
    if "top1" in facts
}
# Trained by timm with hyper-parameters that are not published, or by nobody outside Microsoft.
WITHOUT = {"halonet_26t", "halonet_50ts", "sehalonet_33ts", "eca_halonext_26ts", "halo_regnetz_b", "davit_g"}
# The same model with one block where it has many, at the smallest size that shows it.
NARROW = {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128)}
SMALL: dict[str, dict[str, Any]] = {
    "BiFormer": NARROW,
    "DaViT": NARROW | {"num_heads": (1, 2, 3, 4)},
    "VAN": NARROW,
    "NAT": NARROW | {"num_heads": (1, 2, 3, 4), "dilation": 1},
    "HaloNet": {"layout": ("h", "h", "h", "h"), "embed_dims": (32, 64, 96, 128)},
    "IsotropicNAT": {"depth": 2, "img_size": 96, "kernel_size": 3, "embed_dim": 96, "num_heads": 3},
    "Sparsifiner": {"depth": 1, "img_size": 64},
    "DependencyViT": {"img_size": 64},
    "NiNformer": {"depth": 1, "img_size": 32, "embed_dim": 48},
    "LookupViT": {"depth": 1, "img_size": 64, "compressed_size": 2, "embed_dim": 96, "num_heads": 3},
}


def _args(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe's flags for a small model and made-up data; two updates make an epoch."""
    monkeypatch.chdir(ROOT)
    # What a recipe leaves to its command, so that the flags can be read.
    weights = str(tmp_path / "weights.safetensors")
    Path(weights).touch()
    more = ["--pretrained-path", weights] if "_1_predictor" in path.stem else []
    more += ["--initial-checkpoint", weights, "--teacher-weights", weights] if "_2_backbone" in path.stem else []
    more += ["--model", "davit_t"] if path.parent.name == "finetune" and path.stem != "few_images" else []
    return parse_train_args(["--config", str(path), "--dataset", "synthetic", "--device", "cpu", *more])


def _two_updates(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    args = _args(path, tmp_path, monkeypatch)
    # The whole model takes the recipe's arguments, too; on no device, for some have half a billion parameters.
    options = {"drop_path_rate": args.drop_path} if args.drop_path is not None else {}
    whole = timm.create_model(args.model, device="meta", **options, **args.model_kwargs)
    kwargs = args.model_kwargs | SMALL[type(whole).__name__]
    if args.model.startswith("vitrpb"):
        kwargs.pop("kernel_size")
    if "compressed_sizes" in kwargs:
        kwargs |= {"compressed_sizes": [1, 2]}
    args.model_kwargs, args.num_classes, args.workers = kwargs, 5, 0
    args.img_size = kwargs.get("img_size", 32)
    args.batch_size = args.validation_batch_size = 2
    args.grad_accum_steps = min(args.grad_accum_steps, 2)
    args.train_num_samples, args.val_num_samples = 4 * args.grad_accum_steps, 2
    args.lr = args.lr or args.lr_base
    if args.pretrained_path or args.initial_checkpoint:
        save_file(timm.create_model(args.model, num_classes=5, **kwargs).state_dict(), tmp_path / "weights.safetensors")
    data_config = data_config_for(args)
    data = open_data(args, data_config["input_size"])
    torch.manual_seed(0)
    model = create_model(args, 5, data_config)
    engine = Engine(model, data, data_config, args, Processes("cpu"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    loss = engine.train_epoch(lambda: None)
    assert engine.updates == 2
    assert engine.bad_batches == 0
    assert 0 < loss < 1e4
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    return engine


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "configs" / "imagenet" / f"{name}.yaml"
    engine = _two_updates(path, tmp_path, monkeypatch)
    assert engine.args.experiment == name
    head = "".join(line[2:] for line in path.read_text().splitlines(keepends=True) if line.startswith("# "))
    for label in ("Command:", "Hardware:", "Time:", "Accuracy:", "Recipe:"):
        assert label in head
    assert f"--config configs/imagenet/{name}.yaml" in head
    gpus, batch, total = map(int, re.search(r"(\d+) GPUs?.*? x (\d+) images.*?= (\d+)\.", head).groups())  # type: ignore
    args = _args(path, tmp_path, monkeypatch)
    assert (args.batch_size, gpus * batch * args.grad_accum_steps) == (batch, total)
    if name in REPORTED:
        assert f"{REPORTED[name]} % top-1 as reported" in head


def test_every_model_with_a_published_recipe_has_one() -> None:
    recipes = {re.sub(r"_(1_predictor|2_backbone)$", "", name) for name in IMAGENET}
    recipes |= {re.sub(r"_from_22k$", "", name) for name in IMAGENET}
    assert REPORTED.keys() - recipes == WITHOUT


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_fine_tuning(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _two_updates(path, tmp_path, monkeypatch)
    if engine.args.freeze_epochs:
        head = {id(parameter) for parameter in engine.model.get_classifier().parameters()}  # type: ignore[operator]
        assert all(p.requires_grad == (id(p) in head) for p in engine.model.parameters())
    assert f"--config configs/finetune/{path.name}" in path.read_text()
