# Tests of the codec and the store.
tq_add_test(codec_rotation_test SOURCES codec_rotation_test.cpp LABELS core)
tq_add_test(codec_encode_test SOURCES codec_encode_test.cpp LABELS core)
tq_add_test(codec_reference_test SOURCES codec_reference_test.cpp LABELS core)
tq_add_test(codec_isa_test SOURCES codec_isa_test.cpp LABELS core)

# TURBOQUANT_ISA is read once a process, so it is set before one starts.
foreach(isa portable no_such_isa)
    add_test(NAME codec_isa_test.environment_${isa}
        COMMAND ${CMAKE_COMMAND} -E env TURBOQUANT_ISA=${isa} $<TARGET_FILE:codec_isa_test> --gtest_filter=IsaEnvironment.*)
    set_tests_properties(codec_isa_test.environment_${isa} PROPERTIES LABELS core)
endforeach()
tq_add_test(conditioning_test SOURCES conditioning_test.cpp LABELS core)
tq_add_test(profile_test SOURCES profile_test.cpp LABELS core)
tq_add_test(store_condition_test SOURCES store_condition_test.cpp LABELS core)
tq_add_test(store_rows_test SOURCES store_rows_test.cpp LABELS core)
if(TARGET rapidcheck)
    tq_add_test(store_native_test SOURCES store_native_test.cpp LABELS core)
    tq_add_test(store_model_test SOURCES store_model_test.cpp LABELS core)
else()
    message(WARNING "RapidCheck not found: store_native_test and store_model_test are left out")
endif()
