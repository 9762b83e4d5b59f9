# cmake -DTESTS=python/tests -DLIBRARY=libturboquant_cpu.so -P python_script.cmake: the tests of the PyTorch package.
if(NOT DEFINED ENV{TQ_TEST_TORCH_PYTHON})
    message("SKIPPED: TQ_TEST_TORCH_PYTHON is not set: no Python with torch and pytest (scripts/setup test)")
    return()
endif()
set(ENV{TURBOQUANT_CPU_LIBRARY} "${LIBRARY}")
execute_process(COMMAND "$ENV{TQ_TEST_TORCH_PYTHON}" -B -m pytest -q -rs -p no:cacheprovider "${TESTS}"
                RESULT_VARIABLE status)
if(NOT status EQUAL 0)
    message(FATAL_ERROR "pytest ${TESTS}: exit status ${status}")
endif()
