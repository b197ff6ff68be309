"""Teachers, offset ensembles and distillation: everything that makes a student.

`labelling` needs onnxruntime but no torch; the other modules need torch.
"""
