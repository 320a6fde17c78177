# Read by CMake after the project() line of llama.cpp (CMAKE_PROJECT_llama.cpp_INCLUDE), when llama-cpp-python builds it.
# Halves the work of the compiler and changes no compiler option: ggml's kernels are built as ever.

# libllama-common and its HTTP library are never loaded by the Python package, and libmtmd does not use them. A normal
# variable: option(LLAMA_BUILD_COMMON) respects it (CMP0077), and it hides the cache entry of llama-cpp-python.
set(LLAMA_BUILD_COMMON OFF)

# The 45 graph builders of libmtmd are small files that each read the same large headers: 12 of them are compiled as one
# (llama.cpp does that with its own graph builders). Only in the version that this was tried with: two files of a newer
# one might define the same name.
function(lfm2vl_join_models)
    if (NOT TARGET mtmd)
        return()
    endif()
    get_target_property(sources mtmd SOURCES)
    get_target_property(folder mtmd SOURCE_DIR)
    foreach(source ${sources})
        if (NOT source MATCHES "^models/.*\\.cpp$")
            set_source_files_properties(${folder}/${source}
                TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
        endif()
    endforeach()
    set_target_properties(mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 12)
endfunction()

# Vulkan's headers of Debian 12 lack types that llama.cpp names: see vulkan.hpp. A global property, as the
# function runs later and elsewhere.
set_property(GLOBAL PROPERTY LFM2VL_VULKAN_TYPES "${CMAKE_CURRENT_LIST_DIR}/vulkan.hpp")
function(lfm2vl_add_vulkan_types)
    if (TARGET ggml-vulkan AND NOT MSVC)
        get_property(types GLOBAL PROPERTY LFM2VL_VULKAN_TYPES)
        get_target_property(folder ggml-vulkan SOURCE_DIR)
        set_source_files_properties(${folder}/ggml-vulkan.cpp
            TARGET_DIRECTORY ggml-vulkan PROPERTIES COMPILE_OPTIONS "-include;${types}")
    endif()
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL lfm2vl_add_vulkan_types)

if (EXISTS "${CMAKE_SOURCE_DIR}/llama_cpp/__init__.py")
    file(STRINGS "${CMAKE_SOURCE_DIR}/llama_cpp/__init__.py" version REGEX "^__version__ = \"0\\.3\\.36\"")
    if (version)
        cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL lfm2vl_join_models)
    endif()
endif()
