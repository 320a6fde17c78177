"""The vision encoder and projector: a ggml graph for processors, libmtmd for GPUs."""
