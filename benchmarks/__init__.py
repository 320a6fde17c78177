"""Scripts that make test models and measure; run them from the repository root with python -m."""
