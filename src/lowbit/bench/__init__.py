"""How fast: what ``lowbit bench`` needs."""
