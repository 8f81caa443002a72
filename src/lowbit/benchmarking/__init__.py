"""Measuring speed: steps of a transformer beside other libraries, linear layers beside the machine's limit."""
