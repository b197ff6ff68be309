"""Head-pose networks: their specification, weights, and the deployed ONNX graph.

`spec` and `graph` need neither torch nor a GPU; the torch modules are imported on demand only.
"""
