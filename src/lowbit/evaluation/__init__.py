"""Showing how close a quantized model is to its reference: metrics, gates, comparisons."""
