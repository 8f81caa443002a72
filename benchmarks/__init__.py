"""Measuring speed, memory and quality; each module is a command, results are kept in ``results/``."""
