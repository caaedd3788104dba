"""albumentations pipelines from YAML, repeated augmentation and several views, the same whenever drawn again."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import LIVELY, assert_same_run, killed
from safetensors.torch import load_file
from timm.data import auto_augment
from torch import nn
from visattn_tools import training
from visattn_tools.augment import Albumentations, train_transform
from visattn_tools.checkpoint import load_state
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args
from visattn_tools.data import open_data, seeded
from visattn_tools.loaders import EpochSampler, TrainLoader
from visattn_tools.processes import Processes
from visattn_tools.split_norm import split_batch_norms

Flags = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
PIPELINES = sorted((ROOT / "configs" / "augmentation").glob("*.yaml"))
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "center"}


def _batches(flags: list[str], epoch: int = 0, batch: int = 0) -> torch.Tensor:
    args = parse_train_args(flags)
    loader = TrainLoader(open_data(args, (3, 32, 32)).train, args, CONFIG, Processes("cpu"))
    loader.start_at(epoch, batch)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_ready_pipelines(path: Path) -> None:
    """Every draw gives an image of the size, another one each time, and the same from the same seed."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    pipeline = Albumentations(path, (48, 64))
    views = []
    for seed in (*range(12), 0):
        with seeded(seed):
            views.append(pipeline(photo))
    assert {view.shape for view in views} == {(3, 48, 64)}
    assert {view.dtype for view in views} == {np.dtype(np.uint8)}
    assert len({view.tobytes() for view in views}) == 12
    assert np.array_equal(views[0], views[-1])


def test_a_pipeline_is_seeded_per_epoch_and_kept_with_the_run(flags: Flags, tmp_path: Path) -> None:
    more = ["--aug", "albumentations", "--aug-config", ROOT / "configs/augmentation/strong.yaml"]
    whole = _batches(flags("x", *more), epoch=2)
    assert torch.equal(whole[8:], _batches(flags("x", *more, "--workers", 2), epoch=2, batch=1))
    assert not torch.equal(whole, _batches(flags("x", *more), epoch=1))
    more = [*LIVELY, *map(str, more)]
    training.main(flags("straight", *more))
    assert killed(flags("broken", *more), 14, "step")
    training.main(flags("broken", *more, "--resume", "auto"))
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")
    kept = yaml.safe_load((tmp_path / "runs/straight/augmentation.yaml").read_text())
    names = [entry["__class_fullname__"] for entry in kept["transform"]["transforms"]]
    assert names == ["RandomResizedCrop", "HorizontalFlip", "SomeOf"]
    assert kept["transform"]["transforms"][0]["size"] == [32, 32]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", r"expected transforms: a list of one name with its arguments each"),
        ("transforms: 3", r"3 is no list"),
        ("transforms: [{Flip: {}, Crop: {}}]", r"expected transforms"),
        ("transforms: [HorizontalFlop]", r"albumentations has no HorizontalFlop; did you mean 'HorizontalFlip'"),
        ("transforms: [{HorizontalFlip: 1}]", r"HorizontalFlip: 1 must be arguments with values"),
        ("transforms: [{HorizontalFlip: {q: 1}}]", r"HorizontalFlip has no argument 'q'"),
        ("transforms: [{RandomCrop: {height: -1, width: 3}}]", r"RandomCrop: "),
        ("transforms: [HorizontalFlip]", r"gives uint8 images of 89x63 px; expected uint8 of 32x32: crop to size"),
        ("transforms: [{Resize: {height: height, width: width}}, Normalize]", r"gives float32 images of 32x32 px"),
        ("transforms: [{RandomCrop: {height: 200, width: 200}}]", r"fails on an RGB picture"),
        ("{", r"--aug-config .*pipeline.yaml: "),
    ],
)
def test_bad_pipelines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Albumentations(path, (32, 32))


def test_flags_of_pipelines(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--aug albumentations and --aug-config FILE need each other"):
        parse_train_args(flags("x", "--aug", "albumentations"))
    with pytest.raises(UserError, match=r"--aug-config nowhere.yaml: no such file"):
        parse_train_args(flags("x", "--aug", "albumentations", "--aug-config", "nowhere.yaml"))
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"--aug albumentations needs a package: pip install albumentations"):
        Albumentations(PIPELINES[0], (32, 32))


def test_repeated_augmentation(flags: Flags) -> None:
    """Each picture comes three times in other views, to different processes; an epoch is as long as without."""
    data = open_data(parse_train_args(flags("x")), (3, 32, 32))
    processes = [Processes("cpu") for _ in range(3)]
    for rank, process in enumerate(processes):
        process.count, process.rank = 3, rank
    samplers = [EpochSampler(data.train, 0, process, repeats=3) for process in processes]  # type: ignore[arg-type]
    shares = [sampler.keys() for sampler in samplers]
    assert [len(share) for share in shares] == [6, 6, 6]
    for together in zip(*shares):
        assert len({key % 18 for key in together}) == 1, "the same picture"
        assert sorted(key // 18 for key in together) == [0, 1, 2], "another view"
    (fractional,) = [EpochSampler(data.train, 0, Processes("cpu"), repeats=1.5).keys()]
    assert len(set(fractional)) == 18
    assert len({key % 18 for key in fractional}) == 12
    once, thrice = (_batches(flags("x", "--aug-repeats", n, "--batch-size", 6)) for n in (0, 3))
    assert once.shape == thrice.shape
    assert not torch.equal(thrice[0], thrice[1])


def test_several_views_of_an_image(flags: Flags) -> None:
    """The first half is a plain crop and flip, the second has colours changed as well; resplit spares the first."""
    more = ["--aug-splits", 2, "--jsd-loss", "--aa", "augmix-m5-w4-d2", "--batch-size", 6]
    views = _batches(flags("x", *more))[:12]
    plain, changed = views.chunk(2)
    assert not torch.equal(plain, changed)
    erased = _batches(flags("x", *more, "--reprob", 1.0, "--resplit"))[:12]
    assert torch.equal(erased[:6], plain)
    assert not torch.equal(erased[6:], changed)
    training.main(flags("run", *more, "--epochs", 1, "--warmup-epochs", 0))


def test_norms_of_their_own_for_each_view(flags: Flags) -> None:
    """They see other statistics, and are left out of the weights that are for use."""
    more = ["--aug-splits", 2, "--jsd-loss", "--split-bn", "--aa", "rand-m9-inc1", "--batch-size", 6]
    more += ["--epochs", 1, "--warmup-epochs", 0, "--model-ema"]
    run = training.train(parse_train_args(flags("run", *more)))
    plain = timm.create_model("test_efficientnet", num_classes=3).state_dict()
    assert load_file(run.best).keys() == load_file(run.last).keys() == plain.keys()
    state = load_state(run.state)
    for kind in ("model", "ema"):
        assert len(state[kind]) == len(plain) + len([key for key in plain if "bn" in key])
    means = [key for key in plain if key.endswith("running_mean")]
    assert not any(
        torch.equal(state["model"][key], state["model"][key.replace(".running", ".aux_bn.0.running")]) for key in means
    )
    training.main(flags("run", *more, "--epochs", 2, "--resume", "auto"))
    with pytest.raises(UserError, match=r"was run with --aug-splits 2, not 3"):
        training.main(flags("run", *more, "--epochs", 3, "--aug-splits", 3, "--resume", "auto"))
    with pytest.raises(UserError, match=r"--split-bn: test_vit has no batch norms"):
        training.main(flags("vit", *more, "--model", "test_vit", "--model-kwargs", "img_size=32"))
    other = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    with pytest.raises(UserError, match=r"--split-bn: mine has batch norms of something else than maps"):
        split_batch_norms(other, 2, "mine", (3, 2, 2))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split-bn"], r"--split-bn needs --aug-splits"),
        (["--split-bn", "--aug-splits", "2", "--sync-bn"], r"--split-bn cannot be had with --sync-bn"),
        (["--aug-repeats", "0.5"], r"--aug-repeats 0.5 must be 0 or at least 1"),
        (["--jsd-loss"], r"--aug-splits 0 must be at least 2 with --jsd-loss"),
        (["--aug-splits", "2", "--mixup", "0.1"], r"--aug-splits cannot be had with --mixup"),
        (["--resplit"], r"--resplit needs --aug-splits"),
    ],
)
def test_flags_that_do_not_go_together(flags: Flags, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_train_args(flags("x", *more))


@pytest.mark.parametrize("policy", ["rand-m10-n8-inc1", "rand-m9-mstd0.5-inc1", "original", "3a"])
def test_policies_of_timm_take_every_magnitude(flags: Flags, policy: str) -> None:
    """At the largest one posterising keeps no bit, which Pillow takes for an error from version 13 on."""
    transform = train_transform(parse_train_args(flags("x", "--aa", policy)), CONFIG)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    with seeded(0):
        for _ in range(60):
            assert transform(photo).shape == (3, 32, 32)
    black = auto_augment.NAME_TO_OP["PosterizeIncreasing"](photo, 0)
    assert (black.mode, black.size, black.getextrema()) == ("RGB", (40, 40), ((0, 0),) * 3)
