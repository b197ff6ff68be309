"""Reports: JSON that others may read, Markdown, and one HTML page that needs nothing else."""
