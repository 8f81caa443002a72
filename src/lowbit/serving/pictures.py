"""Pictures in and out: decoding what requests bring, encoding what answers hold, keeping what URLs lead to."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import time
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lowbit.serving.errors import invalid
from lowbit.serving.settings import Limits

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
INPUT_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = "data:image/"


def encode(image: Any, output_format: str = "png", compression: int | None = None) -> bytes:
    """Return a PIL image as a file.

    Args:
        image: of PIL.
        output_format: png, jpeg or webp.
        compression: quality of jpeg and webp, 0 to 100; ``None`` is 100. PNG is lossless.
    """
    stream = io.BytesIO()
    options = {} if output_format == "png" else {"quality": 100 if compression is None else compression}
    image.save(stream, format=output_format.upper(), **options)
    return stream.getvalue()


def zipped(files: Sequence[bytes], output_format: str) -> bytes:
    """Return files as a zip, which does not compress pictures further."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for index, content in enumerate(files):
            archive.writestr(zipfile.ZipInfo(f"image_{index}.{output_format}"), content)
    return stream.getvalue()


def decode(content: bytes, param: str, limits: Limits) -> Any:
    """Return a picture that a request brings, RGB or with an alpha channel.

    Raises:
        ApiError: it is no PNG, JPEG or WebP, is damaged, or has too many pixels, which its header tells.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=INPUT_FORMATS)
        if image.width * image.height > limits.max_input_pixels:
            raise invalid(f"{param}: {image.width}x{image.height} is more than {limits.max_input_pixels} pixels", param)
        image.load()
        return image.convert("RGBA" if "A" in image.getbands() else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise invalid(f"{param}: is not a valid picture in {', '.join(INPUT_FORMATS)}", param) from error


def decode_data_url(url: str, param: str, limits: Limits) -> Any:
    """Return the picture in a data URL; raises ``ApiError`` for any other URL, none of which is fetched."""
    if not url.startswith(_DATA_URL):
        raise invalid(f"{param}: expected a data URL (data:image/png;base64,...); the server fetches no others", param)
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise invalid(f"{param}: expected a data URL in base64", param)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param}: is not valid base64", param) from error
    return decode(content, param, limits)


def data_url(content: bytes, output_format: str) -> str:
    """Return a file as a data URL."""
    return f"data:{MEDIA_TYPES[output_format]};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Stored:
    """A file that a URL leads to.

    Attributes:
        content: its bytes.
        media_type: of them.
        expires: on the clock of ``time.monotonic``, in seconds.
    """

    content: bytes
    media_type: str
    expires: float


class PictureStore:
    """Keeps files in memory under names that can't be guessed, for a time and up to a number of bytes."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes, self.ttl_s, self.size = max_bytes, ttl_s, 0
        self._files: OrderedDict[str, Stored] = OrderedDict()

    def put(self, content: bytes, output_format: str) -> str:
        """Keep a file and return its name; the oldest give way."""
        self._expire()
        name = f"{secrets.token_urlsafe(32)}.{output_format}"
        self._files[name] = Stored(content, MEDIA_TYPES[output_format], time.monotonic() + self.ttl_s)
        self.size += len(content)
        while self.size > self.max_bytes and len(self._files) > 1:
            self._drop(next(iter(self._files)))
        return name

    def get(self, name: str) -> Stored | None:
        """Return a file, ``None`` if there is none or its time is over."""
        self._expire()
        return self._files.get(name)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._files and next(iter(self._files.values())).expires <= now:
            self._drop(next(iter(self._files)))

    def _drop(self, name: str) -> None:
        self.size -= len(self._files.pop(name).content)
