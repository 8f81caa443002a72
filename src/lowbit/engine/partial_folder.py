"""A pipeline's folder in the making: components are added one by one, and what was added survives an interruption.

It stands beside the folder it is to become, under the name ``TARGET.partial``. A component is written to a folder
within, moved to its place when it is whole, and then listed in ``lowbit-export.json``; what is not listed is removed
when the next run goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowbit.containers.atomic import naming_full_disk, write_text
from lowbit.errors import ConfigError

logger = logging.getLogger(__name__)

STATE = "lowbit-export.json"
_STAGING = ".writing"


class PartialFolder:
    """The folder, locked for this process; ``partial_folder`` makes it.

    Attributes:
        target: the folder it is to become.
        path: where it is until then.
        finished: component -> what ``add`` was told about it, for those that are whole.
    """

    def __init__(self, target: Path, fingerprint: Mapping[str, Any]) -> None:
        self.target = target
        self.path = partial_path(target)
        self._fingerprint = fingerprint
        self._entries: dict[str, dict[str, Any]] = self._read()
        self._write_state()
        for found in self.path.iterdir():
            if found.name != STATE and found.name not in self._entries:
                _remove(found)

    @property
    def finished(self) -> dict[str, Any]:
        """What ``add`` was told, by component."""
        return {name: entry["about"] for name, entry in self._entries.items()}

    @contextmanager
    def add(self, component: str, about: Any = None) -> Iterator[Path]:
        """Yield a folder to write the component's folder, of its name, into; afterwards the component is finished.

        Args:
            component: its name.
            about: plain data to keep with it.
        """
        staging = self.path / _STAGING
        staging.mkdir()
        try:
            with naming_full_disk(self.target / component):
                yield staging
            (staging / component).mkdir(exist_ok=True)  # nothing may have been written
            for file in _files(staging / component):
                file.chmod(0o644)  # safetensors makes files for their owner alone
            (staging / component).rename(self.path / component)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._entries[component] = {"files": _sizes(self.path / component), "about": about}
        self._write_state()

    def finish(self, files: Mapping[str, str]) -> None:
        """Write files beside the components, name -> text, and give the folder its name."""
        for name, text in files.items():
            write_text(self.path / name, text)
        self.path.rename(self.target)
        (self.target / STATE).unlink()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the finished components of an earlier run, those whose files are as they were left."""
        file = self.path / STATE
        if not file.exists():
            if any(not found.name.startswith(".") for found in self.path.iterdir()):
                raise ConfigError(f"{self.path} is in the way, and no unfinished export of lowbit's: move or delete it")
            return {}
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            begun, entries = dict(state["fingerprint"]), dict(state["finished"])
            whole = {name: entry for name, entry in entries.items() if entry["files"] == _sizes(self.path / name)}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged: delete {self.path} to start anew") from error
        asked = json.loads(json.dumps(self._fingerprint))
        other = sorted(key for key in {*begun, *asked} if begun.get(key) != asked.get(key))
        if other:
            raise ConfigError(
                f"{self.path} holds an unfinished export that differs in: {', '.join(other)}. Repeat the command it was"
                " begun with to go on, or delete it to start anew"
            )
        return whole

    def _write_state(self) -> None:
        state = {"fingerprint": self._fingerprint, "finished": self._entries}
        write_text(self.path / STATE, json.dumps(state, indent=1))


@contextmanager
def partial_folder(target: Path, fingerprint: Mapping[str, Any]) -> Iterator[PartialFolder]:
    """Open the unfinished folder of ``target``, or begin one; it is kept on an error if it has a finished component.

    Args:
        target: the folder it is to become.
        fingerprint: plain data on which every byte depends that will be written.

    Raises:
        ConfigError: one was begun with another fingerprint or is being written by another process, or there is
            something else under its name.
    """
    path = partial_path(target)
    with _locked(path):
        is_new = not path.exists()
        path.mkdir(exist_ok=True)
        partial: PartialFolder | None = None
        try:
            with naming_full_disk(target):
                partial = PartialFolder(target, fingerprint)
                yield partial
        except BaseException:
            if partial is not None and partial.finished:
                logger.warning("%s is unfinished: the same command again goes on with it", path)
            elif partial is not None or is_new:
                shutil.rmtree(path, ignore_errors=True)
            raise


def partial_path(target: Path) -> Path:
    """Return where ``target`` is while it is written."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes away from ``folder`` by a lock file beside it."""
    lock = FileLock(f"{folder}.lock", timeout=0)
    try:
        with naming_full_disk(folder):
            lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{folder} is being written by another process: wait for it or stop it") from error
    try:
        yield
    finally:
        # Before the release: nobody waits for the lock, so nobody can come to hold the file that is gone.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _sizes(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
