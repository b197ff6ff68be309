"""From a float graph and face crops to a Q/DQ graph: ranges, Q/DQ, joint rounding, lint.

`edgehp.quantization.quantize.quantize` is the one entry that a build calls. The device needs
`edgehp.quantization.recipe` only; onnx and onnxruntime are imported when they are used.
"""
