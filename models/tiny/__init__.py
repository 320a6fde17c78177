"""The demonstration model: its pictures, its training, its evaluation, and the checkpoint."""
