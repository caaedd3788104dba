"""Writing files so that a reader, or a crash, never meets half of one."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cli import UserError


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: the block writes the temporary file it is given, which then replaces `path`.

    The data is on the disk before the new name is, so a power cut leaves the old file or the new one.

    Args:
        path: The file.
        previous: Name that the file which is replaced gets. A kill between the two renames leaves this one alone, so
            a reader of `path` must look for it; at no time is there neither.

    Raises:
        UserError: The disk is full or the folder not writable; the old file is intact.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_together(path: Path, companion: str) -> Iterator[Path]:
    """Write a file that may have another one beside it so that a block that fails leaves both as they were.

    Args:
        path: The file. The block writes ``folder / path.name`` into the folder that it is given.
        companion: Name of the other one, which the block may write, too. If it does not, an old one is removed.

    Raises:
        UserError: The disk is full or the folder not writable.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield folder
        written = [folder / name for name in (companion, path.name) if (folder / name).is_file()]
        for file in written:
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        for file in written:
            os.replace(file, path.with_name(file.name))
        if folder / companion not in written:
            path.with_name(companion).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def previous_name(path: Path) -> Path:
    """Name of the file before `path`: ``last.prev.safetensors`` of ``last.safetensors``."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
