"""Models as files: opened without loading, read tensor by tensor, run block by block."""
