"""``tools/compute_points.py``: its table and its file, what it counts, memory, mistakes."""

import json
from pathlib import Path

import pytest
import torch
from visattn_tools import compute_points
from visattn_tools.cli import UserError
from visattn_tools.measuring import peak_memory

SMALL = ["test_lookupvit", "--peer", "test_vit", "--img-size", "64", "-b", "2", "--rounds", "3", "--device", "cpu"]


def test_points_beside_the_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    other = {"model": "test_lookupvit", "bench": "count", "params": 1}
    path.write_text(json.dumps([other]))
    compute_points.main([*SMALL, "--sizes", "2", "8x4", "--output", str(path)])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("test_lookupvit beside test_vit: hardware ")
    assert [row.split()[0] for row in rows] == ["peer", "2x2", "8x4"]
    records = json.loads(path.read_text())
    assert other in records
    figures = next(record for record in records if record["bench"] == "compute_points")
    assert all(figures[key] for key in ("hardware", "threads", "date", "torch", "peer"))
    assert [point.pop("compressed") for point in figures["points"]] == ["peer", "2x2", "8x4"]
    peer, small, large = figures["points"]
    assert peer["ratio_to_peer"] == 1.0
    assert small["gmacs"] < large["gmacs"]
    assert small["activations_mib"] < large["activations_mib"]
    assert all(value > 0 for point in (peer, small, large) for value in point.values())


def test_default_points_and_peers() -> None:
    """The four sizes of the specification; each peer has its LookupViT's width, depth and heads."""
    args = compute_points.compute_points_parser().parse(["lookupvit_b16"])
    assert args.sizes == [(3, 3), (5, 5), (7, 7), (10, 10)]
    for name, peer in compute_points.PEERS.items():
        ours, theirs = compute_points._checked(
            compute_points.compute_points_parser().parse([name, "--peer", peer]), "meta"
        )
        assert (ours.embed_dim, len(ours.blocks)) == (theirs.embed_dim, len(theirs.blocks))
        assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_peak_memory() -> None:
    """What is alive at the same time counts, not what is allocated in all."""

    def step() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.uint8)
        a, b = torch.empty(3000, dtype=torch.uint8), torch.empty(4000, dtype=torch.uint8)
        del a, b
        torch.empty(6000, dtype=torch.uint8)

    assert peak_memory(step, "cpu") == 7000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["biformer_t", "--peer", "test_vit"], "biformer_t cannot be made for --img-size 224: .*'img_size'"),
        (["sparsifiner_t16", "--peer", "test_vit"], "sparsifiner_t16 is no LookupViT"),
        (["lookupvit_mini"], "lookupvit_mini has no peer of its own: give --peer"),
        (["lookupvit_t16", "--peer", "resnet18"], "resnet18 cannot be made for --img-size 224: .*'img_size'"),
        (["lookupvit_z"], "lookupvit_z"),
        ([*SMALL, "--sizes", "9"], r"--sizes: compressed_size=\(9, 9\) exceeds the lookup grid 8x8 on axis H"),
        ([*SMALL, "--sizes", "3by4"], "'3by4' is no grid; expected a number for a square, or HxW such as 5x7"),
        ([*SMALL, "--sizes", "0"], r"--sizes: compressed_size=\(0, 0\) must be at least 1 on axis H"),
    ],
)
def test_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_points.main(flags)
