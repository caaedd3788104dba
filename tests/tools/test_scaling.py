"""The plan in configs/SCALING.md: its arithmetic, its page, and measurements that it takes in."""

import json
from pathlib import Path
from typing import Any

import pytest
from visattn_tools import scaling
from visattn_tools.cli import UserError

ASSUMED = {"cores_per_machine": 32, "gpus_per_machine": 4, "reserve": 1.5}
ASSUMED |= {"shard_megabytes": 100, "shuffled_images": 1000}
PLAN = {"name": "plan", "images": 3_600_000, "bytes_per_image": 50_000, "gpus": 8, "epochs": 10}


def test_needs_by_hand() -> None:
    """1000 images/s at 4 ms are 4 cores, 6 with the reserve, of 8 that there are."""
    found = scaling.needs(PLAN, 4.0, 1000, ASSUMED)
    assert found.cores_per_gpu == pytest.approx(6)
    assert found.utilisation == 1
    assert found.epoch_hours == pytest.approx(3_600_000 / 8000 / 3600)
    assert found.hours == pytest.approx(10 * found.epoch_hours)
    assert (found.terabytes, found.images_per_shard, found.shards) == (pytest.approx(0.18), 2000, 1800)
    assert found.mb_per_second == pytest.approx(4 * 1000 * 0.05)
    assert found.buffers_gb == pytest.approx(6 * 4 * 1000 * 50_000 / 1e9)


def test_gpus_wait_for_few_cores() -> None:
    found = scaling.needs(PLAN, 16.0, 1000, ASSUMED)
    assert found.cores_per_gpu == pytest.approx(24)
    assert found.utilisation == pytest.approx(1 / 3)
    assert found.epoch_hours == pytest.approx(3 * 3_600_000 / 8000 / 3600)
    assert found.buffers_gb == pytest.approx(8 * 4 * 1000 * 50_000 / 1e9)


def test_the_page_is_up_to_date() -> None:
    path, text = scaling.page()
    assert path.read_text(encoding="utf-8") == text, "run python tools/scaling.py"
    scaling.main(["--check"])


def test_plans_rest_on_measurements_with_their_origin() -> None:
    facts = json.loads((scaling.ROOT / "configs/scaling.json").read_text())
    for row in facts["measured"]:
        assert all(row[key] for key in ("hardware", "date", "torch", "cpu_ms_per_image", "images"))
    for plan in facts["plans"]:
        row = scaling._cost(facts["measured"], plan)
        enough = plan["gpus"] * facts["assumed"]["cores_per_machine"] / facts["assumed"]["gpus_per_machine"]
        size = plan["bytes_per_image"] or row["bytes_per_image"]
        shards = scaling.needs(plan | {"bytes_per_image": size}, row["cpu_ms_per_image"], 1e3, facts["assumed"]).shards
        assert shards > enough, f"{plan['name']}: some processes would have no shard"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of its own with the plan's two files."""
    (tmp_path / "configs").mkdir()
    for name in ("SCALING.md", "scaling.json"):
        (tmp_path / "configs" / name).write_bytes((scaling.ROOT / "configs" / name).read_bytes())
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    return tmp_path


def test_new_measurements_change_the_page(copy: Path) -> None:
    facts = json.loads((copy / "configs/scaling.json").read_text())
    rows: list[dict[str, Any]] = [row | {"cpu_ms_per_image": 100.0} for row in facts["measured"]]
    (copy / "results.json").write_text(json.dumps(rows))
    before = (copy / "configs/SCALING.md").read_text()
    scaling.main(["--results", str(copy / "results.json")])
    after = (copy / "configs/SCALING.md").read_text()
    assert "| 100.00 |" in after
    assert "| 100.00 |" not in before
    assert before.split(scaling.START)[0] == after.split(scaling.START)[0]


def test_bad_input(copy: Path) -> None:
    results = copy / "results.json"
    for text in ("{", '[{"a": 1}]', "3"):
        results.write_text(text)
        with pytest.raises(UserError, match=r"--results .*results.json is none of tools/loader_benchmark.py"):
            scaling.main(["--results", str(results)])
    with pytest.raises(UserError, match=r"--results none.json: No such file"):
        scaling.main(["--results", "none.json"])
    results.write_text("[]")
    with pytest.raises(UserError, match=r"no measurement with loader processes is that of ImageNet-1k: .*shards"):
        scaling.main(["--results", str(results)])
    (copy / "configs/scaling.json").write_bytes((Path(__file__).parents[2] / "configs/scaling.json").read_bytes())
    page = copy / "configs/SCALING.md"
    page.write_text(page.read_text() + "\n")
    scaling.main([])
    page.write_text(page.read_text().replace("| ImageNet-1k |", "| ImageNet |"))
    with pytest.raises(UserError, match=r"out of date: configs/SCALING.md; run python tools/scaling.py"):
        scaling.main(["--check"])
    page.write_text("nothing")
    with pytest.raises(UserError, match=r"configs/SCALING.md has no place for the tables"):
        scaling.main([])
