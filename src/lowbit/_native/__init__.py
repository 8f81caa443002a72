"""The optional native helper's sources, and the built library when there is one. Used by ``lowbit.ops.cpu.native``."""
