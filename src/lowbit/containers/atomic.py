"""Writing a file so that no half of it is ever found, and saying which disk is full."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class DiskFullError(OSError):
    """A disk that is full, or the user's share of it, with the file in ``filename`` and the disk in the message."""


@contextmanager
def replace_when_written(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file to write under a temporary name; afterwards it is renamed to ``path``, or removed on an error.

    Raises:
        DiskFullError: there is no room for it.
    """
    path = Path(path)
    with naming_full_disk(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with naming_full_disk(path), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Turn errors of a full disk, which often name neither file nor disk, into those that do.

    Raises:
        DiskFullError: in place of another error of a full disk.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = _full_disk(error)
        if number is None:
            raise
        disk = _mount_point(Path(path).absolute().parent)
        usage = shutil.disk_usage(disk)
        room = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free on {disk}"
        text = f"{os.strerror(number)}: {room}. Free some, or write to another disk"
        raise DiskFullError(number, text, str(path)) from error


def _full_disk(error: Exception) -> int | None:
    """Return the errno of a full disk, ``None`` for other errors."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in numbers:
        return error.errno
    # safetensors' errors are none of the operating system's: their text holds Rust's.
    return next((number for number in numbers if f"(os error {number})" in str(error)), None)


def _mount_point(folder: Path) -> Path:
    while not folder.exists() or not (os.path.ismount(folder) or folder == folder.parent):
        folder = folder.parent
    return folder


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text as ``replace_when_written`` does."""
    with replace_when_written(path) as file:
        file.write(text.encode("utf-8"))
