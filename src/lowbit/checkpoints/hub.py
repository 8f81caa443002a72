"""Files that a user names: local ones, or those of a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.errors import ConfigError


def resolve_safetensors(option: str, name: str) -> Path:
    """Return the local file for what a user writes, downloaded from the Hub if need be.

    Args:
        option: that it was written for, for messages.
        name: a file or ``owner/repo/file.safetensors``.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.(?:safetensors|sft))", name)
    if on_hub is None:
        raise ConfigError(f"{option}: there is no file {name}, and it has not the form owner/repo/file.safetensors")
    return download(option, *on_hub.groups())


def download(option: str, repository: str, file: str) -> Path:
    """Return the local copy of a file on the Hub.

    Raises:
        ConfigError: it can't be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # of the network or of the Hub: many kinds, all with a message
        raise ConfigError(f"{option}: can't get {file} of {repository}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
