"""Damaged and hostile inputs in large numbers, each judged in a child process with limits: `python -m tests.fuzz`."""
