"""Programs that measure, and the random checkpoints that they measure with."""
