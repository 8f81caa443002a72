"""CPU backends of the operators, one module per implementation."""
