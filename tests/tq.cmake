# The program: unit tests of the parts that need no model, and the binary run as a user would run it. Models come through
# TQ_TEST_SMOLLM2, _GEMMA and _TINY (environment, or what set-up found); without them those tests are skipped, and say so.

tq_add_test(tq_units_test SOURCES tq_units_test.cpp LIBS tq_base LABELS tq)
tq_add_test(tq_bits_test SOURCES tq_bits_test.cpp LIBS tq_base LABELS tq)
tq_add_test(tq_session_test SOURCES tq_session_test.cpp LIBS tq_serve LABELS tq)
tq_add_test(tq_eval_test SOURCES tq_eval_test.cpp LIBS tq_llm LABELS tq)
if(TURBOQUANT_BUILD_PLUGIN)
    tq_add_test(tq_bench_test SOURCES tq_bench_test.cpp LIBS tq_llm LABELS tq)
    add_dependencies(tq_bench_test ggml-turboquant)
endif()

find_package(Python3 COMPONENTS Interpreter)
if(NOT Python3_FOUND)
    message(STATUS "tests of tq: no Python 3, only the unit tests run")
    return()
endif()

if(NOT TURBOQUANT_BUILD_PLUGIN)
    message(STATUS "tests of tq: the plug-in is not built, only the unit tests run")
    return()
endif()

# One ctest entry a group, so that one failing group does not hide the others and they can run side by side.
foreach(group IN ITEMS Usage Files Run Chat Context Save Session Terminal Info Kinds Demo)
    add_test(NAME tq_${group}
             COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tq_program_test.py $<TARGET_FILE:tq> ${group})
    set_tests_properties(tq_${group} PROPERTIES LABELS tq TIMEOUT 240 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
endforeach()

# Profiles, in a file of their own.
foreach(group IN ITEMS Tune Profile Budget)
    add_test(NAME tq_${group}
             COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tq_tune_test.py $<TARGET_FILE:tq> ${group})
    set_tests_properties(tq_${group} PROPERTIES LABELS tq TIMEOUT 480 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
endforeach()

# tq eval; also of plot-kld.
foreach(group IN ITEMS Kld Ppl Niah EvalErrors)
    add_test(NAME tq_${group}
             COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tq_eval_test.py $<TARGET_FILE:tq> ${group})
    set_tests_properties(tq_${group} PROPERTIES LABELS tq TIMEOUT 300 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
endforeach()

# tq bench, plot-decode, bench-ik.
foreach(group IN ITEMS BenchAttention BenchEncode BenchDecode BenchPrefill BenchErrors)
    add_test(NAME tq_${group}
             COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tq_bench_test.py $<TARGET_FILE:tq> ${group})
    set_tests_properties(tq_${group} PROPERTIES LABELS tq TIMEOUT 300)
endforeach()

# tq serve over restarts, under load.
foreach(group IN ITEMS Restart BenchServe Soak)
    add_test(NAME tq_${group}
             COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tq_load_test.py $<TARGET_FILE:tq> ${group})
    set_tests_properties(tq_${group} PROPERTIES LABELS tq TIMEOUT 480 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
endforeach()
