"""Vision encoder and projector: a ggml graph for processors, libmtmd for GPUs; imports what the engine may."""
