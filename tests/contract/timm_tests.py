"""Provides timm's own model tests: fetched from its source distribution, checked, unpacked into ``.cache``.

The version and the sha256 stand in ``requirements/timm-tests.txt`` and nowhere else. Run this file to fetch ahead of
time (``python tests/contract/timm_tests.py``); the contract tests call :func:`timm_tests` and fetch when needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = ROOT / "requirements" / "timm-tests.txt"
CACHE = ROOT / ".cache"


class TimmTestsUnavailableError(RuntimeError):
    """timm's tests are neither in the cache nor fetchable; the message says how to get them."""


class Pin(NamedTuple):
    """The one archive that is accepted."""

    version: str
    sha256: str

    @property
    def archive_name(self) -> str:
        """File name of the source distribution."""
        return f"timm-{self.version}.tar.gz"


def read_pin(requirement: Path = REQUIREMENT) -> Pin:
    """Version and hash from the requirements file.

    Raises:
        ValueError: the file pins no timm version with a sha256.
    """
    match = re.search(r"^timm==(\S+)\s+--hash=sha256:([0-9a-f]{64})\s*$", requirement.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{requirement}: expected one line 'timm==VERSION --hash=sha256:HEX'")
    return Pin(*match.groups())


def timm_tests(cache: Path = CACHE, requirement: Path = REQUIREMENT) -> Path:
    """Path of timm's ``tests/test_models.py``, byte for byte as its authors released it.

    Args:
        cache: Folder that holds the archive and its unpacked tests; created when absent.
        requirement: Requirements file that pins the archive.

    Raises:
        TimmTestsUnavailableError: no archive with the pinned hash is there and none can be downloaded.
    """
    pin = read_pin(requirement)
    archive = cache / pin.archive_name
    if not (archive.is_file() and _sha256(archive) == pin.sha256):
        _download(pin, archive, requirement)
    return _unpack(pin, archive) / "test_models.py"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(pin: Pin, archive: Path, requirement: Path) -> None:
    """pip fetches, so that a mirror or a proxy configured for pip serves this too."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--disable-pip-version-check", "--no-input"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, "--requirement", requirement]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        fetched = Path(folder) / pin.archive_name
        if done.returncode == 0 and fetched.is_file() and _sha256(fetched) == pin.sha256:
            os.replace(fetched, archive)
            return
    state = "there, but its sha256 is another" if archive.exists() else "absent"
    raise TimmTestsUnavailableError(
        f"timm's tests are not available: {archive} is {state}, and pip could not download it:\n"
        + "\n".join("    " + line for line in done.stdout.strip().splitlines()[-8:])
        + f"\nRemedy: with a network, run `python tests/contract/timm_tests.py`; without one, copy {pin.archive_name} "
        f"(timm's source distribution, sha256 {pin.sha256}) into {archive.parent}. "
        "To leave these tests out: pytest -m 'not contract'."
    )


def _unpack(pin: Pin, archive: Path) -> Path:
    """Writes each test file that differs from the archive's.

    Only ``tests/`` comes out: an unpacked ``timm/`` beside it would be imported in place of the installed one.
    """
    folder = archive.parent / f"timm-{pin.version}"
    prefix = f"timm-{pin.version}/tests/"
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.isfile() and re.fullmatch(re.escape(prefix) + r"\w+\.py", member.name)):
                continue
            stream = tar.extractfile(member)
            assert stream is not None, member.name
            target, content = folder / "tests" / Path(member.name).name, stream.read()
            if not (target.is_file() and target.read_bytes() == content):
                write_atomically(target, content)
    return folder / "tests"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` in one step: a reader or a second process sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


if __name__ == "__main__":
    try:
        print(timm_tests())
    except TimmTestsUnavailableError as error:
        sys.exit(f"error: {error}")
