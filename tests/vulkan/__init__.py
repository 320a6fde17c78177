"""llama.cpp built for Vulkan, in a virtual environment of its own (make vulkan)."""

VISIBLE = "GGML_VK_VISIBLE_DEVICES"
"""ggml's variable for the numbers of the devices that it may use."""
