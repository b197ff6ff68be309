"""Parts of `tools/render_heads.py`: heads with exactly known rotation from open geometry."""
