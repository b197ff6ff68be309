"""Parts of ``tools/compare_quantizers.py``: one network, many ways to INT8, measured alike."""
