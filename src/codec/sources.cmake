# Sources of src/codec: target_sources(turboquant PRIVATE ...) and per-file compile options (instruction sets).
target_sources(turboquant PRIVATE
    codec/codec.cpp
    codec/isa.cpp
    codec/kernels_portable.cpp
    codec/reference.cpp
    codec/rotation.cpp)

# No errno from square roots and no traps to preserve: no branches for them. What is computed stays the same.
set(TURBOQUANT_KERNEL_OPTIONS "-fno-math-errno;-fno-trapping-math")
set_source_files_properties(codec/kernels_portable.cpp PROPERTIES COMPILE_OPTIONS "${TURBOQUANT_KERNEL_OPTIONS}")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag("-mavx2 -mfma -mf16c" TURBOQUANT_COMPILER_AVX2)
    check_cxx_compiler_flag("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni" TURBOQUANT_COMPILER_AVX512)
    check_cxx_compiler_flag("-mavxvnni" TURBOQUANT_COMPILER_AVXVNNI)
    check_cxx_compiler_flag("-mavx512vbmi" TURBOQUANT_COMPILER_AVX512VBMI)
    if(TURBOQUANT_COMPILER_AVX2)
        target_sources(turboquant PRIVATE codec/kernels_avx2.cpp)
        target_compile_definitions(turboquant PRIVATE TURBOQUANT_HAVE_AVX2)
        set_source_files_properties(codec/kernels_avx2.cpp PROPERTIES
            COMPILE_OPTIONS "${TURBOQUANT_KERNEL_OPTIONS};-mavx2;-mfma;-mf16c")
        if(TURBOQUANT_COMPILER_AVXVNNI)
            target_compile_definitions(turboquant PRIVATE TURBOQUANT_HAVE_AVXVNNI)
        endif()
    endif()
    if(TURBOQUANT_COMPILER_AVX2 AND TURBOQUANT_COMPILER_AVX512)
        target_sources(turboquant PRIVATE codec/kernels_avx512.cpp)
        target_compile_definitions(turboquant PRIVATE TURBOQUANT_HAVE_AVX512)
        if(TURBOQUANT_COMPILER_AVX512VBMI)
            target_compile_definitions(turboquant PRIVATE TURBOQUANT_HAVE_AVX512VBMI)
        endif()
        set_source_files_properties(codec/kernels_avx512.cpp PROPERTIES
            COMPILE_OPTIONS "${TURBOQUANT_KERNEL_OPTIONS};-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512")
    endif()
endif()
