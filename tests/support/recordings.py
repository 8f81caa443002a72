"""How processes of recordings begin in tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from lowbit.evaluation import recording

PRELOADED = ["lowbit.engine.omni", "lowbit.evaluation.recording", "diffusers.pipelines.z_image.pipeline_z_image"]


@pytest.fixture(scope="package", autouse=True)
def forked_recordings() -> Iterator[None]:
    """Fork them from a process that has imported the libraries, which would take most of their time.

    That process has used neither torch nor a device. Commands that tests run as a user does still spawn.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    multiprocessing.set_forkserver_preload(PRELOADED)
    before, recording.START_METHOD = recording.START_METHOD, "forkserver"
    yield
    recording.START_METHOD = before
