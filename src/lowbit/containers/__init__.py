"""Files as containers: GGUF, safetensors, JSON; every offset checked, every write atomic."""
