# Sources of src/attention, and the instruction sets that some of them are compiled for.
target_sources(turboquant PRIVATE
    ${CMAKE_CURRENT_LIST_DIR}/attend.cpp
    ${CMAKE_CURRENT_LIST_DIR}/exact_rows.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_portable.cpp
    ${CMAKE_CURRENT_LIST_DIR}/plan.cpp
    ${CMAKE_CURRENT_LIST_DIR}/reference.cpp)

# Attention may contract a*b+c (its results differ by rounding between instruction sets anyway), the codec may not.
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_portable.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=fast")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    target_sources(turboquant PRIVATE
        ${CMAKE_CURRENT_LIST_DIR}/kernels_avx2.cpp
        ${CMAKE_CURRENT_LIST_DIR}/kernels_avx512.cpp)
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS
        "-ffp-contract=fast;-mavx2;-mfma;-mf16c")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
        "-ffp-contract=fast;-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels.cpp PROPERTIES COMPILE_DEFINITIONS TURBOQUANT_X86_KERNELS)
endif()
