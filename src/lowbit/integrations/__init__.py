"""lowbit as a quantizer of diffusers and of transformers."""
