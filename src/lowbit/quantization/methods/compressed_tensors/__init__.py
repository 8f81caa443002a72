"""Checkpoints of llm-compressor in the format of the ``compressed-tensors`` package (0.20.1).

``quantization_config`` holds ``config_groups``, each with the numbers of its weights and activations and the layers it
is for. On disk, with N output and K input channels and groups of g inputs:

=======================  ==================================================================================
format                   tensors of a layer
=======================  ==================================================================================
``pack-quantized``       ``weight_packed`` int32 [N, ceil(K * bits / 32)], ``weight_scale`` [N, K / g],
                         ``weight_shape`` int64 [2]; asymmetric: ``weight_zero_point`` int32
                         [ceil(N * bits / 32), K / g]; older files: ``weight_g_idx`` int32 [K]
``int-quantized``        ``weight`` int8 [N, K], ``weight_scale`` [N, 1] or [1]; static activations:
                         ``input_scale`` [1] and, asymmetric, ``input_zero_point`` int8 [1]
``float-quantized``,     ``weight`` e4m3 [N, K], ``weight_scale`` [N, 1], [1] or one a block; static
``naive-quantized``      activations: ``input_scale`` [1]
``nvfp4-pack-quantized`` ``weight_packed`` uint8 [N, K / 2], ``weight_scale`` e4m3 [N, K / 16],
                         ``weight_global_scale`` float32 [1], which is divided by; with activations
                         ``input_global_scale`` float32 [1]
``mxfp4-pack-quantized`` ``weight_packed`` uint8 [N, K / 2], ``weight_scale`` E8M0 uint8 [N, K / 32]
``mxfp8-quantized``      ``weight`` e4m3 [N, K], ``weight_scale`` E8M0 uint8 [N, K / 32]
=======================  ==================================================================================

Scales have the dtype of the model they were made from; it is kept when the checkpoint is written again.
"""

from lowbit.quantization.methods.compressed_tensors.config import CompressedTensorsConfig

__all__ = ["CompressedTensorsConfig"]
