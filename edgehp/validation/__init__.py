"""Accuracy of an artifact against its FP32 reference: metrics, paired statistics, gate."""
