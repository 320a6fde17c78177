"""64-bit ARM without a board: cross-built kernels and arm64 packages, run by an emulator (`make arm`)."""
