"""edgehp: head-pose networks from checkpoint to a measured INT8 engine in the car."""

__version__ = "0.2.0"
