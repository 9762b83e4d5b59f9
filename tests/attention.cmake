# Tests of attention.
tq_add_test(attention_test SOURCES attention_cases_test.cpp attention_features_test.cpp
    attention_jobs_test.cpp attention_paging_test.cpp attention_visibility_test.cpp LABELS core)
# It replaces operator new, which the sanitizers do themselves; GCC takes its delete for a mismatch when it inlines one of the two.
if(NOT TURBOQUANT_SANITIZE)
    tq_add_test(attention_memory_test SOURCES attention_memory_test.cpp LABELS core)
    target_compile_options(attention_memory_test PRIVATE -Wno-mismatched-new-delete)
endif()
if(TARGET rapidcheck)
    tq_add_test(attention_property_test SOURCES attention_property_test.cpp LABELS core)
else()
    message(WARNING "RapidCheck not found: attention_property_test is left out")
endif()
# The same on another processor, emulated.
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64" AND NOT TURBOQUANT_SANITIZE)
    add_test(NAME neon_emulated COMMAND ${PROJECT_SOURCE_DIR}/scripts/test-neon)
    set_tests_properties(neon_emulated PROPERTIES LABELS core TIMEOUT 600 SKIP_RETURN_CODE 77)
endif()
