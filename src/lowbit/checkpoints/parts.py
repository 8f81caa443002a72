"""Some components of a pipeline, loaded and saved by diffusers as it does a whole one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline


def parts_class(names: Sequence[str]) -> type[Any]:
    """Return a pipeline class that consists of the components ``names`` and of nothing else.

    Its ``from_pretrained`` of a whole pipeline's folder loads these components only. The pipeline's own class, given
    ``None`` for the others, would do it too for most pipelines; but some read their components when they are made.
    """

    def __init__(self: Any, **components: Any) -> None:  # noqa: N807
        DiffusionPipeline.__init__(self)
        self.register_modules(**components)

    # From the signature diffusers learns which components a pipeline has.
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", positional), *(inspect.Parameter(name, keyword) for name in names)]
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Parts", (DiffusionPipeline,), {"__init__": __init__})
