"""Head-pose networks: their specification, weights, and the deployed ONNX graph.

`spec` and `graph` need neither torch nor a GPU; the torch modules are imported on demand only.
"""

# What `edgehp describe` writes behind a value that the file does not tell; `load_description` names
# what still has it.
FILL_IN = "# fill in"
