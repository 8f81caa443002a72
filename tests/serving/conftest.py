"""One model, one server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowbit import Omni
from tests.support.server import Running, running


@pytest.fixture(scope="session")
def omni() -> Omni:
    return Omni(device="cpu", quantization="int8")


@pytest.fixture(scope="module")
def server(omni: Omni) -> Iterator[Running]:
    with running(omni, ignored_fields=frozenset({"temperature"}), extra_params=frozenset({"cfg_truncation"})) as found:
        yield found
