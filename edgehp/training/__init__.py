"""Teachers, offset ensembles and distillation: everything that makes a student.

`teachers` and `labelling` need onnxruntime but no torch; the other modules need torch.
"""
