# Read by CMake after the project() line of llama.cpp (CMAKE_PROJECT_llama.cpp_INCLUDE), when llama-cpp-python builds it.
# Leaves out what the Python package never loads: libllama-common and the HTTP library that only it needs. No compiler
# option changes, so the libraries that remain are the same.

# A normal variable: option(LLAMA_BUILD_COMMON) respects it (CMP0077), and llama-cpp-python's cache entry does not win.
set(LLAMA_BUILD_COMMON OFF)
