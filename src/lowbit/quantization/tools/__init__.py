"""Doors for vLLM-Omni's module paths: each runs a command of lowbit's own."""
