# Sources of src/attention, and the instruction sets that some of them are compiled for.
target_sources(turboquant PRIVATE
    attention/attend.cpp
    attention/exact_rows.cpp
    attention/kernels.cpp
    attention/kernels_portable.cpp
    attention/plan.cpp
    attention/reference.cpp
    attention/task.cpp
    attention/visibility.cpp)

# Attention may contract a*b+c (its results differ by rounding between instruction sets anyway), the codec may not.
set_source_files_properties(attention/kernels_portable.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=fast")

# What the compiler can do was found out in codec/sources.cmake.
if(TURBOQUANT_COMPILER_AVX2)
    target_sources(turboquant PRIVATE attention/kernels_avx2.cpp)
    set_source_files_properties(attention/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS
        "-ffp-contract=fast;-mavx2;-mfma;-mf16c")
endif()
if(TURBOQUANT_COMPILER_AVX2 AND TURBOQUANT_COMPILER_AVXVNNI)
    target_sources(turboquant PRIVATE attention/kernels_avxvnni.cpp)
    set_source_files_properties(attention/kernels_avxvnni.cpp PROPERTIES COMPILE_OPTIONS
        "-ffp-contract=fast;-mavx2;-mfma;-mf16c;-mavxvnni")
endif()
if(TURBOQUANT_COMPILER_AVX2 AND TURBOQUANT_COMPILER_AVX512)
    target_sources(turboquant PRIVATE attention/kernels_avx512.cpp)
    set_source_files_properties(attention/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
        "-ffp-contract=fast;-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512")
endif()
if(TURBOQUANT_COMPILER_AVX512 AND TURBOQUANT_COMPILER_AVX512VBMI)
    target_sources(turboquant PRIVATE attention/kernels_avx512vbmi.cpp)
    set_source_files_properties(attention/kernels_avx512vbmi.cpp PROPERTIES COMPILE_OPTIONS
        "-ffp-contract=fast;-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mavx512vbmi;-mprefer-vector-width=512")
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag("-march=armv8.2-a+dotprod" TURBOQUANT_COMPILER_NEON_DOT)
    if(TURBOQUANT_COMPILER_NEON_DOT)
        target_sources(turboquant PRIVATE attention/kernels_neon.cpp)
        target_compile_definitions(turboquant PRIVATE TURBOQUANT_HAVE_NEON_DOT)
        set_source_files_properties(attention/kernels_neon.cpp PROPERTIES COMPILE_OPTIONS
            "-ffp-contract=fast;-march=armv8.2-a+dotprod")
    endif()
endif()
