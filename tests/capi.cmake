# The C interface, from a file that is compiled as C99.
add_executable(capi_test capi_test.c)
set_target_properties(capi_test PROPERTIES C_STANDARD 99 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF LINKER_LANGUAGE CXX)
target_link_libraries(capi_test PRIVATE turboquant tq_warnings m)
if(TURBOQUANT_TEST_LAUNCHER)
    set_target_properties(capi_test PROPERTIES CROSSCOMPILING_EMULATOR "${TURBOQUANT_TEST_LAUNCHER}")
endif()
add_test(NAME capi_test COMMAND capi_test)
set_tests_properties(capi_test PROPERTIES LABELS core TIMEOUT 60)
