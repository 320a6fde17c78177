"""The published models against their checkpoints and transformers: `make published`, for whoever has a network."""
