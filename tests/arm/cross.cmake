# Read by CMake after the project() line of llama.cpp, as .ci/llama.cmake is when llama-cpp-python builds it.
# libllama and libmtmd compute no products: with less optimization the compiler needs half of the time. ggml is as ever.

include("${CMAKE_CURRENT_LIST_DIR}/../../.ci/llama.cmake")

function(lfm2vl_compile_faster)
    foreach(target llama mtmd)
        if (TARGET ${target})
            target_compile_options(${target} PRIVATE -O1)
        endif()
    endforeach()
endfunction()

cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL lfm2vl_compile_faster)
