"""Loading a pipeline, generating with it and measuring both."""

from lowbit.engine.config import OmniDiffusionConfig
from lowbit.engine.omni import Omni

__all__ = ["Omni", "OmniDiffusionConfig"]
