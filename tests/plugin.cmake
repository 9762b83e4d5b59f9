# The plug-in exercised through unmodified hosts: libllama, llama-cpp-python and llama-server. Needs llama.h; models and
# tools come through TQ_TEST_* variables (scripts/README.md), and what is missing is skipped with a message.
#
#   TQ_TEST_PYTHON  TQ_TEST_SMOLLM2  TQ_TEST_GEMMA  TQ_TEST_LLAMA_SERVER     cache variable or environment

find_package(llama QUIET)
if(NOT llama_FOUND)
    message(STATUS "tests of the plug-in: llama.cpp not found, left out")
    return()
endif()

foreach(name IN ITEMS PYTHON SMOLLM2 GEMMA LLAMA_SERVER)
    set(TQ_TEST_${name} "" CACHE FILEPATH "For the plug-in's tests; empty: what set-up found")
endforeach()

# What ctest runs before the tests: paths that this build knows. A variable that the caller has set wins.
set(plugin_environment "${PROJECT_BINARY_DIR}/plugin_test_environment")
set(content "")
foreach(name IN ITEMS PYTHON SMOLLM2 GEMMA LLAMA_SERVER)
    if(TQ_TEST_${name})
        string(APPEND content "if(NOT DEFINED ENV{TQ_TEST_${name}})\n  set(ENV{TQ_TEST_${name}} [==[${TQ_TEST_${name}}]==])\nendif()\n")
    endif()
endforeach()
foreach(pair IN ITEMS "PLUGIN|$<TARGET_FILE:ggml-turboquant>" "CHILD|$<TARGET_FILE:plugin_child>"
                      "CACHE|${PROJECT_BINARY_DIR}/test_cache" "SCRIPTS|${PROJECT_SOURCE_DIR}/tests")
    string(REPLACE "|" ";" pair "${pair}")
    list(GET pair 0 name)
    list(GET pair 1 value)
    string(APPEND content "if(NOT DEFINED ENV{TQ_TEST_${name}})\n  set(ENV{TQ_TEST_${name}} [==[${value}]==])\nendif()\n")
endforeach()

# The tiny models: written at build time, with the Python that has gguf.
set(tiny_models "${PROJECT_BINARY_DIR}/tiny_models")
if(TQ_TEST_PYTHON)
    set(model_python "${TQ_TEST_PYTHON}")
elseif(DEFINED ENV{TQ_TEST_PYTHON})
    set(model_python "$ENV{TQ_TEST_PYTHON}")
else()
    set(model_python "${TURBOQUANT_ENV_PYTHON}")
endif()
if(model_python)
    add_custom_command(OUTPUT "${tiny_models}/written"
        COMMAND "${model_python}" "${PROJECT_SOURCE_DIR}/tests/models/make_models.py" "${tiny_models}"
        COMMAND "${CMAKE_COMMAND}" -E touch "${tiny_models}/written"
        DEPENDS "${PROJECT_SOURCE_DIR}/tests/models/make_models.py"
        COMMENT "Writing tiny models for the plug-in's tests" VERBATIM)
    add_custom_target(tiny_models ALL DEPENDS "${tiny_models}/written")
    string(APPEND content "if(NOT DEFINED ENV{TQ_TEST_TINY})\n  set(ENV{TQ_TEST_TINY} [==[${tiny_models}]==])\nendif()\n")
else()
    message(STATUS "tests of the plug-in: no Python with gguf (TQ_TEST_PYTHON), tests of tiny models will be skipped")
endif()
file(GENERATE OUTPUT "${plugin_environment}_$<CONFIG>.cmake" CONTENT "${content}")
set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${plugin_environment}_${CMAKE_BUILD_TYPE}.cmake")

add_library(plugin_host STATIC plugin_host.cpp)
target_include_directories(plugin_host PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}")
target_link_libraries(plugin_host PUBLIC llama GTest::gtest Threads::Threads PRIVATE tq_warnings)

# One program that the tests run as a child, where a crash must not take the test down or memory is measured.
add_executable(plugin_child plugin_child.cpp)
target_link_libraries(plugin_child PRIVATE plugin_host tq_warnings)
add_dependencies(plugin_child ggml-turboquant)

foreach(suite IN ITEMS models sequences state refusal fidelity recall profile calibration)
    # Seconds of work with real models, minutes beside other work: two spinning threads, starved.
    tq_add_test(plugin_${suite}_test SOURCES plugin_${suite}_test.cpp LIBS plugin_host LABELS plugin TIMEOUT 300)
    add_dependencies(plugin_${suite}_test ggml-turboquant plugin_child)
endforeach()
tq_add_test(plugin_memory_test SOURCES plugin_memory_test.cpp LIBS plugin_host LABELS plugin SERIAL)
add_dependencies(plugin_memory_test ggml-turboquant plugin_child)

# Parts of the plug-in itself, with the host's ggml.
tq_add_test(plugin_rope_test SOURCES plugin_rope_test.cpp ${PROJECT_SOURCE_DIR}/src/ggml/rope.cpp LIBS ggml::ggml ggml::ggml-base
            LABELS plugin)
set(key_source "")
foreach(name IN ITEMS key_source rope tuner)
    list(APPEND key_source "${PROJECT_SOURCE_DIR}/src/ggml/${name}.cpp")
endforeach()
tq_add_test(plugin_key_source_test SOURCES plugin_key_source_test.cpp ${key_source} LIBS ggml::ggml ggml::ggml-base LABELS plugin)

# Hosts that are not ours at all. Exit status 77: something they need is missing.
foreach(script IN ITEMS python server)
    add_test(NAME plugin_${script} COMMAND "${CMAKE_COMMAND}" -DSCRIPT=${CMAKE_CURRENT_SOURCE_DIR}/plugin_${script}_test.py
             -P "${CMAKE_CURRENT_SOURCE_DIR}/plugin_script.cmake")
    set_tests_properties(plugin_${script} PROPERTIES LABELS plugin TIMEOUT 240 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
endforeach()
