"""Checkpoints of other tools and lowbit's own: read, checked and written."""
