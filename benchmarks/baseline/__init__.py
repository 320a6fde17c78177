"""The bench beside llama.cpp's own tools, step by step in turn on the same files: `python -m benchmarks.baseline`."""
