"""Objectives as a user trains with them: Sparsifiner's strategies, LookupViT's two heads and sizes, and mistakes."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from visattn_tools import training
from visattn_tools.cli import UserError
from visattn_tools.objectives import LookupViTObjective, Objective, objective_for

Flags = Callable[..., list[str]]
SPARSIFINER = ["--model", "test_sparsifiner", "--model-kwargs", "img_size=32", "--epochs", "1", "--warmup-epochs", "0"]


def weights(tmp_path: Path, name: str) -> Path:
    return tmp_path / "runs" / name / "checkpoints" / "last.safetensors"


def changed(before: Path, after: Path) -> set[str]:
    a, b = load_file(before), load_file(after)
    return {"mask_predictor" if "mask_predictor" in key else "backbone" for key in a if not torch.equal(a[key], b[key])}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Weights that stand for trained ones."""
    path = tmp_path / "start.safetensors"
    save_file(timm.create_model("test_sparsifiner", num_classes=3, img_size=32).state_dict(), path)
    return path


def test_two_phases(flags: Flags, tmp_path: Path, start: Path) -> None:
    """The authors' recipe: fit the predictor to the dense model, then the backbone under its masks."""
    training.main(flags("fit", *SPARSIFINER, "--lr", 1e-2, "--strategy", "attn_recon", "--initial-checkpoint", start))
    assert changed(start, weights(tmp_path, "fit")) == {"mask_predictor"}
    more = [
        "--initial-checkpoint",
        weights(tmp_path, "fit"),
        "--strategy",
        "cls_distill",
        "--mixup",
        "0.8",
        "--lr",
        "1e-2",
    ]
    training.main(flags("distil", *SPARSIFINER, *more, "--loss-weights", "cls=2", "--teacher-weights", start))
    assert changed(weights(tmp_path, "fit"), weights(tmp_path, "distil")) == {"backbone"}


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [("attn_self_distill", {"mask_predictor"}), ("cls", {"backbone"}), ("joint", {"mask_predictor", "backbone"})],
)
def test_other_strategies(flags: Flags, tmp_path: Path, start: Path, strategy: str, parts: set[str]) -> None:
    more = ["--strategy", strategy, "--initial-checkpoint", start, "--token-distill", "kl", "--lr", 1e-2]
    training.main(flags("run", *SPARSIFINER, *more))
    assert changed(start, weights(tmp_path, "run")) == parts
    if strategy == "joint":  # the authors leave these out
        a, b = load_file(start), load_file(weights(tmp_path, "run"))
        assert all(torch.equal(a[key], b[key]) for key in ("cls_token", "pos_embed"))


def test_a_resumed_run_is_the_same_run(flags: Flags, tmp_path: Path, start: Path) -> None:
    """The teacher is that of the start, not of where the run was left."""
    more = ["--strategy", "joint", "--initial-checkpoint", start, "--lr", 1e-2]
    straight = flags("straight", *SPARSIFINER, *more, "--epochs", 2, "--sched", "constant")
    training.main(straight)
    training.main(flags("broken", *SPARSIFINER, *more, "--epochs", 1, "--sched", "constant"))
    broken = flags("broken", *SPARSIFINER, *more, "--epochs", 2, "--sched", "constant", "--resume", "auto")
    training.main(broken)
    a, b = load_file(weights(tmp_path, "straight")), load_file(weights(tmp_path, "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(UserError, match="was run with --strategy joint, not cls"):
        training.main([*broken, "--strategy", "cls"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--strategy", "cls_distill"],
            "--strategy cls_distill needs a trained teacher: give --teacher-weights, or start",
        ),
        (["--strategy", "dense"], "invalid choice: 'dense'"),
        (["--teacher-weights", "FILE"], "--teacher-weights needs --strategy"),
        (["--strategy", "joint", "--teacher-weights", "nothing.pth"], "--teacher-weights nothing.pth: no such file"),
        (["--strategy", "joint", "--teacher-weights", "FILE"], "the teacher has 5 classes, the data 3"),
        (
            ["--strategy", "cls", "--loss-weights", "ratio=1"],
            "--loss-weights ratio=1: the losses of --strategy cls are cls",
        ),
        (["--strategy", "cls", "--loss-weights", "cls=-1"], "--loss-weights cls=-1: must be a number >= 0"),
        (["--strategy", "joint", "--grad-checkpointing"], "--grad-checkpointing cannot be had with --strategy joint"),
        (
            ["--strategy", "joint", "--torchcompile"],
            "--torchcompile cannot be had with --strategy joint, which looks into",
        ),
    ],
)
def test_mistakes(flags: Flags, tmp_path: Path, more: list[str], message: str) -> None:
    file = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_sparsifiner", num_classes=5, img_size=32).state_dict(), file)
    with pytest.raises(UserError, match=message):
        training.main(flags("bad", *SPARSIFINER, *(str(file) if word == "FILE" else word for word in more)))


def test_models_without_strategies(flags: Flags) -> None:
    with pytest.raises(UserError, match="--strategy cls: test_efficientnet is no Sparsifiner"):
        training.main(flags("bad", "--strategy", "cls"))
    model = torch.nn.Linear(2, 3)
    objective = objective_for(model, torch.nn.functional.cross_entropy, argparse.Namespace(strategy=None))
    assert type(objective) is Objective
    images, targets = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(model(images), targets)
    torch.testing.assert_close(objective(model, images, targets, 0), expected)


LOOKUPVIT = ["--model", "test_lookupvit", "--epochs", "1", "--warmup-epochs", "0", "--model-kwargs", "img_size=32"]


def lookupvit(**kwargs: object) -> tuple[torch.nn.Module, Objective, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_lookupvit", num_classes=3, drop_path_rate=0.0, **kwargs).train()
    args = argparse.Namespace(strategy=None, seed=7)
    objective = objective_for(model, torch.nn.functional.cross_entropy, args)
    return model, objective, torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 1])


def test_both_heads_of_a_lookupvit_train() -> None:
    model, objective, images, targets = lookupvit()
    loss = objective(model, images, targets, 0)
    expected = torch.zeros(())
    for mode in ("compressed", "lookup"):
        model.set_head_mode(mode)
        expected = expected + torch.nn.functional.cross_entropy(model(images), targets) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(images).shape == (4, 3)
    model, objective, images, targets = lookupvit(head_mode="compressed")
    torch.testing.assert_close(
        objective(model, images, targets, 0), torch.nn.functional.cross_entropy(model(images), targets)
    )


def test_compressed_sizes_are_drawn_per_update() -> None:
    """The same for all that share the seed, each about as often, and evaluation keeps its own."""
    sizes = [(2, 2), (3, 3), (4, 4), (2, 5)]
    model, objective, images, targets = lookupvit(compressed_sizes=sizes)
    assert isinstance(objective, LookupViTObjective)
    drawn = [objective.size(step) for step in range(400)]
    assert [objective.size(step) for step in reversed(range(400))] == drawn[::-1]
    counts = [drawn.count(size) for size in sizes]
    assert sum(counts) == 400
    assert min(counts) > 70
    assert drawn != [LookupViTObjective(model, objective.criterion, 8).size(step) for step in range(400)]
    seen = []

    def call(images: torch.Tensor) -> torch.Tensor:
        seen.append(model.compressed_size)
        return model(images)

    for step in (0, 0, 1, 2):
        objective(call, images, targets, step)
    assert seen == [drawn[0], drawn[0], drawn[1], drawn[2]]
    assert model.compressed_size == (3, 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        torch.testing.assert_close(objective(compiled, images, targets, step), objective(model, images, targets, step))


def _train_on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, objective, images, targets = lookupvit(compressed_sizes=[2, 3, 4, 5, 6])
    torch.manual_seed(rank)  # processes augment and drop differently
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    seen, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.1)

    def call(images: torch.Tensor) -> torch.Tensor:
        seen.append(model.compressed_size)
        return wrapped(images)

    for step in range(6):
        torch.randn(rank + 1)
        objective(call, images[2 * rank : 2 * rank + 2], targets[2 * rank : 2 * rank + 2], step).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"seen": seen, "weights": model.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_processes_train_the_same_size(tmp_path: Path) -> None:
    """Two processes with half of the batch each train what one does with all of it."""
    # Not spawn, see test_sharding.
    torch.multiprocessing.start_processes(_train_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["seen"] == second["seen"]
    assert len(set(first["seen"])) > 1
    model, objective, images, targets = lookupvit(compressed_sizes=[2, 3, 4, 5, 6])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        objective(model, images, targets, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for saved in (first, second):
        torch.testing.assert_close(saved["weights"], dict(model.state_dict()))


def test_a_lookupvit_from_the_command_line(flags: Flags, tmp_path: Path) -> None:
    """Sizes, accumulation, mixing, checkpointing; a resumed run is the same run."""
    more = ["compressed_sizes=[2,3,4]", "--mixup", "0.8", "--grad-accum-steps", "2", "--grad-checkpointing"]
    common = [*LOOKUPVIT, *more, "--sched", "constant", "--lr", "1e-2"]
    training.main(flags("straight", *common, "--epochs", 2))
    training.main(flags("broken", *common, "--epochs", 1))
    training.main(flags("broken", *common, "--epochs", 2, "--resume", "auto"))
    a, b = load_file(weights(tmp_path, "straight")), load_file(weights(tmp_path, "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(UserError, match=r"compressed_size=\(9, 9\) exceeds the lookup grid 4x4 on axis H"):
        training.main(flags("bad", *LOOKUPVIT, "compressed_sizes=[9]"))
