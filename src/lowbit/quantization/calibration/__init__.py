"""Watching an unquantized model: static scales and smoothing."""
