"""llama.cpp built for GPUs, in a virtual environment of its own (make vulkan, make cuda)."""
