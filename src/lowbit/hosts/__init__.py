"""lowbit inside diffusers and transformers: quantizers, routing, attention."""
