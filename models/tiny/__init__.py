"""The demonstration model: its images, its training, its evaluation, and the checkpoint."""
