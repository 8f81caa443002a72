"""msModelSlim's checkpoints for Ascend."""
