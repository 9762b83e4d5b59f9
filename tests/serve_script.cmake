# cmake -DSCRIPT=x.py -DTQ=tq -DCASES=Class -P serve_script.cmake: one class of a test script of tq serve, with the Python
# that has the openai client.
if(NOT DEFINED ENV{TQ_TEST_OPENAI_PYTHON} OR NOT DEFINED ENV{TQ_TEST_SMOLLM2})
    message("SKIPPED: TQ_TEST_OPENAI_PYTHON or TQ_TEST_SMOLLM2 is not set (scripts/setup test)")
    return()
endif()
execute_process(COMMAND "$ENV{TQ_TEST_OPENAI_PYTHON}" -B "${SCRIPT}" "${TQ}" "${CASES}" RESULT_VARIABLE status)
if(status EQUAL 77)
    message("SKIPPED: see above")
elseif(NOT status EQUAL 0)
    message(FATAL_ERROR "${SCRIPT} ${CASES}: exit status ${status}")
endif()
