# tq serve: units without a model, the engine on a tiny one, then the server as its clients see it: the `openai` Python client and raw sockets.

tq_add_test(serve_units_test SOURCES serve_units_test.cpp LIBS tq_serve LABELS serve)
tq_add_test(serve_engine_test SOURCES serve_engine_test.cpp LIBS tq_serve LABELS serve)

if(NOT TURBOQUANT_BUILD_PLUGIN)
    message(STATUS "tests of tq serve: the plug-in is not built, only the unit tests run")
    return()
endif()

add_test(NAME serve_page_test COMMAND "${Python3_EXECUTABLE}" -B "${CMAKE_CURRENT_SOURCE_DIR}/serve_page_test.py" $<TARGET_FILE:tq>)
set_tests_properties(serve_page_test PROPERTIES LABELS serve TIMEOUT 240 SKIP_RETURN_CODE 77)

# A ctest entry a group of tests; each starts servers of its own. Exit status 77: something they need is missing.
foreach(group IN ITEMS client_Chat client_Batching http_Requests http_Limits http_Ends)
    string(REGEX MATCH "^[a-z]+" script "${group}")
    string(REGEX MATCH "[A-Z].*$" cases "${group}")
    add_test(NAME serve_${group}
             COMMAND "${CMAKE_COMMAND}" -DSCRIPT=${CMAKE_CURRENT_SOURCE_DIR}/serve_${script}_test.py -DTQ=$<TARGET_FILE:tq>
                     -DCASES=${cases} -P "${CMAKE_CURRENT_SOURCE_DIR}/serve_script.cmake")
    set_tests_properties(serve_${group} PROPERTIES LABELS serve TIMEOUT 240 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
endforeach()
