"""Several devices: how a quantized layer is cut into the slices that ranks hold."""
