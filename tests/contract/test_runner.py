"""The contract run has teeth: what must fail it does fail it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import run_all
import timm_tests
from runner import MAP_TESTS, SIZE_SKIP, TOKEN_TESTS, Result, run_model

TOY = '''
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt

_cfg = dict(
    url="", num_classes=1000, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=0.95, interpolation="bicubic",
    mean=(0.5,) * 3, std=(0.5,) * 3, first_conv="stem.0", classifier="head.fc",
)
default_cfgs = generate_default_cfgs({"toy_lenient": _cfg})


@register_model
def toy_lenient(pretrained=False, **kwargs):
    """A good model but for one thing: it swallows an argument that it does not know."""
    kwargs.pop("not_a_model_arg", None)
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    return build_model_with_cfg(
        ConvNeXt, "toy_lenient", pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(sizes, **kwargs),
    )
'''


@pytest.mark.slow
@pytest.mark.contract
def test_one_fault_in_a_good_model_is_found(tmp_path: Path) -> None:
    package = tmp_path / "toy_zoo"
    package.mkdir()
    (package / "__init__.py").write_text("from . import family\n")
    (package / "family.py").write_text(TOY)
    result = run_model("toy_lenient", package="toy_zoo", path=tmp_path)
    assert (result.count("passed"), result.count("failed"), result.count("skipped")) == (10, 1, 0), result.output
    assert result.problems(64) == ["test_model_default_cfgs[1-toy_lenient] failed: Failed: DID NOT RAISE TypeError"]
    assert result.peak_gib > 0


@pytest.mark.contract
def test_a_model_of_another_package_is_refused() -> None:
    result = run_model("resnet18")
    assert result.outcomes == {}
    assert "model 'resnet18' is registered by timm.models.resnet" in result.problems(224)[0]


def _result(tests: frozenset[str], **changed: str) -> Result:
    return Result("toy", outcomes={f"{test}[toy]": changed.get(test, "passed") for test in tests})


@pytest.mark.parametrize("tests", [MAP_TESTS, TOKEN_TESTS], ids=["map", "token"])
def test_a_full_pass_has_no_problem(tests: frozenset[str]) -> None:
    assert _result(tests).problems(224) == []


def test_no_test_is_no_pass() -> None:
    assert len(Result("toy").problems(224)) == len(MAP_TESTS)
    assert _result(MAP_TESTS - {"test_model_forward_fx"}).problems(224) == ["test_model_forward_fx did not run"]


@pytest.mark.parametrize(
    ("reason", "input_size", "accepted"),
    [(SIZE_SKIP, 512, True), (SIZE_SKIP, 224, False), ("no time", 512, False)],
)
def test_only_a_large_fixed_input_excuses_a_skip(reason: str, input_size: int, accepted: bool) -> None:
    result = _result(MAP_TESTS, test_model_backward="skipped")
    result.reasons["test_model_backward[toy]"] = reason
    assert (result.problems(input_size) == []) is accepted


def _archive(tmp_path: Path, content: bytes) -> tuple[Path, Path]:
    """A cache with a stand-in for timm's archive, and the requirements file that pins it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "timm-0.0.1.tar.gz", "w:gz") as tar:
        for name in ("timm-0.0.1/tests/test_models.py", "timm-0.0.1/timm/__init__.py", "timm-0.0.1/tests/../../out.py"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    requirement = tmp_path / "timm-tests.txt"
    digest = hashlib.sha256((cache / "timm-0.0.1.tar.gz").read_bytes()).hexdigest()
    requirement.write_text(f"timm==0.0.1 --hash=sha256:{digest}\n")
    return cache, requirement


def test_the_archive_is_unpacked_and_kept_as_released(tmp_path: Path) -> None:
    cache, requirement = _archive(tmp_path, b"released\n")
    path = timm_tests.timm_tests(cache, requirement)
    assert path.read_bytes() == b"released\n"
    assert sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*.py")) == ["timm-0.0.1/tests/test_models.py"]
    assert not (tmp_path / "out.py").exists()
    path.write_text("edited by hand\n")
    assert timm_tests.timm_tests(cache, requirement).read_bytes() == b"released\n"


@pytest.mark.parametrize("damage", ["absent", "changed"])
def test_without_the_archive_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    cache, requirement = _archive(tmp_path, b"released\n")
    archive = cache / "timm-0.0.1.tar.gz"
    archive.unlink() if damage == "absent" else archive.write_bytes(b"something else")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(timm_tests.TimmTestsUnavailableError, match=r"(?s)Remedy: with a network, run .*sha256"):
        timm_tests.timm_tests(cache, requirement)


def test_the_page_shows_the_results() -> None:
    document = json.loads(run_all.RESULTS.read_text())
    assert run_all.TABLE.read_text(encoding="utf-8") == run_all.table(document["models"], document["code"])
