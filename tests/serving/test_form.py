"""Multipart bodies that are not whole."""

from __future__ import annotations

import pytest

from lowbit.serving.errors import ApiError
from lowbit.serving.form import parse_form

PARTS = (("prompt", b"a cat"), ("size", b"64x64"))
BODY = (
    b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
        for name, value in PARTS
    )
    + b"--x--\r\n"
)


def test_a_whole_body_is_read() -> None:
    found = parse_form(BODY, "multipart/form-data; boundary=x")
    assert [(part.name, part.content) for part in found] == list(PARTS)


@pytest.mark.parametrize("cut", range(1, len(BODY) - 3))
def test_a_body_that_breaks_off_is_refused(cut: int) -> None:
    with pytest.raises(ApiError, match="breaks off|not valid multipart"):
        parse_form(BODY[:cut], "multipart/form-data; boundary=x")
