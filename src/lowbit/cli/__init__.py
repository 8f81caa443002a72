"""The command line: ``lowbit generate | quantize | info``."""
