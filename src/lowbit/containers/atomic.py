"""Writing a file so that no half of it is ever found."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_when_written(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file to write under a temporary name; afterwards it is renamed to ``path``, or removed on an error."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text as ``replace_when_written`` does."""
    with replace_when_written(path) as file:
        file.write(text.encode("utf-8"))
