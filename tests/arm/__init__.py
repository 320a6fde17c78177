"""The package on 64-bit ARM without a board: cross-built, and run by an emulator of the processor (`make arm`)."""
