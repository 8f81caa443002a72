from tests.support.recordings import forked_recordings

__all__ = ["forked_recordings"]
