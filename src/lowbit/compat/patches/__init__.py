"""What lowbit changes in other libraries so that they work with quantized layers. Imports lowbit's layers."""
