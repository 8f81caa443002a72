"""Programs for those who work on lowbit; none is installed with it."""
