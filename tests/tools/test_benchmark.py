"""tools/benchmark.py: peers in turns, memory, operators, and the engine's loop beside a bare one."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from visattn_kernels.backend import current_override
from visattn_tools import benchmark
from visattn_tools.cli import UserError
from visattn_tools.engine_benchmark import Pair
from visattn_tools.measuring import smaller_batch
from visattn_tools.peers import CONVNEXTS, SAME, VITS, peer_of
from visattn_tools.processes import Processes, StopSignals
from visattn_tools.profiling import gmacs_of_parts
from visattn_tools.results import Record, measured
from visattn_tools.speed import Contestant, Group, Subject, first_batch, groups, input_size

SMALL = ["--device", "cpu", "-b", "2", "--rounds", "3"]


def _run(tmp_path: Path, *words: object) -> dict[str, Record]:
    """The records of a run by model, or by model and backend where there are several."""
    path = tmp_path / "results.json"
    benchmark.main([*map(str, words), *SMALL, "--output", str(path)])
    records = json.loads(path.read_text())
    several = len({record.get("backend") for record in records}) > 1
    return {f"{record['model']} {record['backend']}" if several else record["model"]: record for record in records}


def _subject(name: str, *words: str, training: bool = False) -> Subject:
    args = benchmark.parser().parse([*SMALL, *words])
    return Subject(Contestant(name, input_size(name, args.img_size)), args, 2, training, {})


def test_peers_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "results.csv"
    flags = ["--bench", "training", "--img-size", 64, "--channels-last", "--amp", "--torchcompile", "eager"]
    results = _run(tmp_path, "test_resnet", "--peer", "test_efficientnet", *flags, "--steps", 2, "--csv", table)
    ours, peer = results["test_resnet"], results["test_efficientnet"]
    assert peer["ratio_to_peer"] == 1.0
    assert ours["ratio_to_peer"] == pytest.approx(ours["images_per_second"] / peer["images_per_second"], rel=0.01)
    assert (ours["peer"], ours["peer_images_per_second"]) == ("test_efficientnet", peer["images_per_second"])
    assert (ours["dtype"], ours["channels_last"], ours["compiled"]) == ("bfloat16 autocast", True, "eager")
    assert all(ours[key] for key in ("hardware", "date", "torch", "timm", "python", "command"))
    low, high = ours["step_ms_quartiles"]
    assert low <= ours["step_ms"] <= high
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["model"], row["bench"]) for row in rows] == [
        ("test_resnet", "training"),
        ("test_efficientnet", "training"),
    ]
    assert "x test_efficientnet, " in capsys.readouterr().out


def test_the_command_names_no_places(tmp_path: Path) -> None:
    record = _run(tmp_path, "test_resnet", "test_[v]it", "--csv", tmp_path / "x.csv")["test_vit"]
    assert record["command"] == "python tools/benchmark.py test_resnet 'test_[v]it' --device cpu -b 2 --rounds 3"


def test_backends_beside_each_other(tmp_path: Path) -> None:
    """One that cannot run is named and costs the others nothing."""
    words = ["test_sparsifiner", "--bench", "inference", "--backends", "auto", "triton", "reference", "recompute"]
    with pytest.raises(UserError, match=r"1 could not be measured:\ntest_sparsifiner on triton at 64x64: Value"):
        _run(tmp_path, *words)
    records = json.loads((tmp_path / "results.json").read_text())
    peers = {record["backend"]: record["peer"] for record in records}
    assert peers == dict.fromkeys(["auto", "reference", "recompute"], "test_sparsifiner")
    assert len({record["batch_size"] for record in records}) == 1


def test_a_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = benchmark.parser().parse(SMALL)
    seen = []
    subject = Subject(Contestant("test_resnet", (3, 32, 32), "recompute"), args, 2, False, {})
    monkeypatch.setattr(subject, "call", lambda images: seen.append(current_override()))
    subject.inference()
    assert seen == ["recompute"]
    assert current_override() is None


def test_the_peer_is_chosen_by_architecture_then_by_macs() -> None:
    assert peer_of("davit_t", 4.52, (3, 224, 224)) == "davit_tiny"
    assert peer_of("biformer_s", 4.46, (3, 224, 224)) == "convnext_tiny"
    assert peer_of("biformer_s", 4.46 * 4, (3, 448, 448)) == "convnext_tiny"
    assert peer_of("ninformer_s16", 4.57, (3, 224, 224)) == "vit_small_patch16_224"
    assert peer_of("lookupvit_b16", 8.47, (3, 224, 224)) == "convnext_small"  # between ViT-S and ViT-B
    assert peer_of("davit_no", 1000.0, (3, 224, 224)) is None
    assert peer_of("biformer_mini", 0.02, (3, 64, 64)) is None


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "convnext_atto"])
def test_macs_of_the_peers_are_true(name: str) -> None:
    assert benchmark.count(name)["gmacs"] == pytest.approx((VITS | CONVNEXTS)[name], abs=1e-3)


def test_every_own_version_has_the_macs_of_ours() -> None:
    """timm counts the zeros around the map of its halo models, and its unreleased DaViTs differ a little."""
    figures = measured()
    for ours, theirs in SAME.items():
        counted = figures[ours]["count"]
        assert counted["peer"] == theirs
        assert counted["peer_gmacs"] == pytest.approx(counted["gmacs"], rel=0.04), ours


def test_models_share_the_turns_of_their_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    args = benchmark.parser().parse(["--peer", "auto", "--bench", "inference", *SMALL])
    args.models = ["davit_b", "biformer_s", "dinat_s_t", "biformer_mini", "van_b2", "nat_t", "biformer_stl"]
    names = [([who.name for who in g.members], g.peer.name if g.peer else None) for g in groups(args)]
    assert names == [
        (["biformer_mini"], None),
        (["biformer_stl"], "convnext_tiny"),
        (["biformer_s", "dinat_s_t", "van_b2", "nat_t"], "convnext_tiny"),
        (["davit_b"], "davit_base"),
    ]


def test_an_automatic_peer_sees_the_images_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visattn_tools.speed.peer_of", lambda name, gmacs, size: "test_vit")
    flags = ["--peer", "auto", "--img-size", 64, "--model-kwargs", "num_regions=2"]
    results = _run(tmp_path, "test_biformer", "--bench", "inference", *flags)
    assert {name: record["input_size"] for name, record in results.items()} == {
        "test_biformer": [3, 64, 64],
        "test_vit": [3, 64, 64],
    }


def test_one_bad_model_does_not_lose_the_others_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Subject.inference

    def inference(self: Subject) -> None:
        if isinstance(self.model, timm.models.VisionTransformer):
            raise RuntimeError("no such kernel")
        original(self)

    monkeypatch.setattr(Subject, "inference", inference)
    words = ["test_vit", "test_resnet", "test_efficientnet", "--bench", "inference", "--peer", "test_resnet"]
    words += ["--img-size", "160"]
    with pytest.raises(UserError, match=r"1 could not be measured:\ntest_vit at 160x160: RuntimeError: no such kernel"):
        _run(tmp_path, *words)
    monkeypatch.undo()
    capsys.readouterr()
    results = _run(tmp_path, *words, "--resume")
    output = capsys.readouterr().out
    assert "test_vit " in output
    assert "test_efficientnet " not in output
    assert set(results) == {"test_vit", "test_resnet", "test_efficientnet"}


def test_what_fails_together_is_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Subject.inference
    calls = 0

    def inference(self: Subject) -> None:
        nonlocal calls
        calls += isinstance(self.model, timm.models.VisionTransformer)
        if calls > 1 and isinstance(self.model, timm.models.VisionTransformer):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        original(self)

    monkeypatch.setattr(Subject, "inference", inference)
    with pytest.raises(UserError, match=r"1 could not be measured:\ntest_vit: RuntimeError: CUDA out of memory"):
        _run(tmp_path, "test_resnet", "test_vit", "--bench", "inference")
    assert [record["model"] for record in json.loads((tmp_path / "results.json").read_text())] == ["test_resnet"]


def test_large_models_get_smaller_batches() -> None:
    args = benchmark.parser().parse([])
    args.device = "cuda"
    member = Contestant("test_vit", (3, 160, 160))
    for gmacs, batch_size in ((0.5, 128), (125, 128), (126, 64), (1038, 8), (40_000, 1)):
        assert first_batch(Group([member], None, gmacs), args) == batch_size
    args.batch_size = 48
    assert first_batch(Group([member], None, 1038), args) == 48


def test_training_trains() -> None:
    subject = _subject("test_biformer", "--img-size", "64", "--grad-checkpointing", "--opt", "lamb", training=True)
    assert subject.model.get_submodule("stages.3").grad_checkpointing
    before = {name: value.clone() for name, value in subject.model.named_parameters()}
    subject.training()
    changed = [name for name, value in subject.model.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) > 0.9 * len(before)


def test_all_get_the_batch_that_the_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Subject.inference

    def inference(self: Subject) -> None:
        if len(self.images) > 3 and isinstance(self.model, timm.models.VisionTransformer):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        original(self)

    monkeypatch.setattr(Subject, "inference", inference)
    results = _run(tmp_path, "test_resnet", "test_vit", "--bench", "inference", "-b", 6)
    assert [results[name]["batch_size"] for name in ("test_resnet", "test_vit")] == [2, 2]
    benchmark.main(["test_resnet", "test_vit", "--bench", "inference", *SMALL, "-b", "6"])
    output = capsys.readouterr().out
    assert "no memory for 6 images at once, trying 4" in output
    assert "no memory for 4 images at once, trying 3" in output
    with pytest.raises(UserError, match="test_vit: RuntimeError: CUDA out of memory"):
        benchmark.main(["test_resnet", "test_vit", "--bench", "inference", *SMALL, "-b", "6", "--no-retry"])


def test_only_a_lack_of_memory_makes_batches_smaller() -> None:
    assert smaller_batch(RuntimeError("CUDA out of memory"), 8) == 6
    assert smaller_batch(RuntimeError("CUDA out of memory"), 1) == 0
    assert smaller_batch(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 8) == 0
    assert smaller_batch(RuntimeError("an illegal memory access was encountered"), 8) == 0


def test_activations_are_the_outputs_of_convolutions_and_products() -> None:
    model = timm.create_model("test_efficientnet").eval()
    elements = 0

    def add(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert benchmark.count("test_efficientnet", 64)["activations_m"] == round(elements / 1e6, 3)


def test_macs_of_the_parts_are_those_of_the_model() -> None:
    parts = gmacs_of_parts("biformer_mini", [3, 64, 64], {})
    assert {"stem", "stages.0", "stages.3", "head"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(benchmark.count("biformer_mini")["gmacs"], abs=5e-4)


def test_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    results = _run(tmp_path, "test_vit", "--bench", "profile", "--top", 4, "--trace", trace)
    figures = results["test_vit"]
    for kind in ("inference", "training"):
        rows = figures[f"{kind}_operators"]
        assert len(rows) == 4
        assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
        assert 0 < sum(row["share"] for row in rows) <= 1
    assert figures["training_memory_mib"] > figures["inference_memory_mib"]
    assert figures["params"] == sum(p.numel() for p in timm.create_model("test_vit").parameters())
    assert json.loads(trace.read_text())["traceEvents"]
    assert "test_vit, training: " in capsys.readouterr().out


def test_the_bare_loop_does_what_the_engine_does() -> None:
    """Else the comparison would be none: after as many steps both have the same weights."""
    args = benchmark.parser().parse([*SMALL, "--steps", "3", "--img-size", "64"])
    with Processes("cpu") as processes, StopSignals() as stop:
        pair = Pair("test_resnet", args, processes, stop)
        start = {name: value.clone() for name, value in pair.engines[0].model.state_dict().items()}
        pair.bare()
        pair.engine()
    one, other = (engine.model.state_dict() for engine in pair.engines)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["conv1.0.weight"], start["conv1.0.weight"])
    assert pair.engines[1].updates == 3


def test_the_share_of_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--bench", "engine", "--steps", 2, "--img-size", 64, "--workers", 0]
    figures = _run(tmp_path, "test_resnet", *flags)["test_resnet"]
    assert 0.2 < figures["share_of_bare"] < 5
    assert figures["images_per_second"] > 0
    assert figures["loader_images_per_second"] > 0
    assert "with its loader; " in capsys.readouterr().out


def test_bad_arguments(tmp_path: Path) -> None:
    for words, message in (
        (["test_resnet", "--peer", "test_vitt"], r"unknown model 'test_vitt'; did you mean '"),
        (["no_*"], r"unknown model 'no_\*'"),
        (["test_resnet", "--opt", "adamv"], r"--opt adamv: timm has no such optimizer; did you mean '"),
        (["test_resnet", "--csv", str(tmp_path / "none/x.csv")], r"x.csv: no folder .*none"),
        (["test_resnet", "--device", "cuda:99"], r"--device cuda:99 cannot be used"),
        (["test_vit", "--model-kwargs", "no_such=1"], r"--model test_vit: .*no_such"),
        (["test_vit", "--resume"], r"--resume goes on with the file of --output; give both"),
        (["test_resnet", "--bench", "speed"], r"--bench: invalid choice: 'speed'"),
        (["ninformer_mini", "--bench", "inference", "--img-size", "48"], r"ninformer_mini at 48x48: "),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.main([*SMALL, *words])
