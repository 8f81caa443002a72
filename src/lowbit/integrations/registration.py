"""Registering lowbit with diffusers and transformers once they are imported, without importing them."""

from __future__ import annotations


def install() -> None:
    """Arrange for the registration of lowbit's quantizers with diffusers and transformers."""
