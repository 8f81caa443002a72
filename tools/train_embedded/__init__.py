"""Trains the embedded text-to-image model on scenes that it draws itself."""
