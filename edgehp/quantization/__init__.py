"""From a float graph and face crops to a Q/DQ graph: observers, table, emitters, lint, search.

`edgehp.quantization.quantise.quantise` is the one entry that a build calls. Nothing here is needed
on the device; onnx and onnxruntime are imported when they are used.
"""
