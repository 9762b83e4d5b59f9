# The PyTorch package on CPU tensors, with the Python that has PyTorch (Debian's, after scripts/setup test).
add_test(NAME python_package
         COMMAND "${CMAKE_COMMAND}" -DTESTS=${PROJECT_SOURCE_DIR}/python/tests -DLIBRARY=$<TARGET_FILE:turboquant_cpu>
                 -P "${CMAKE_CURRENT_SOURCE_DIR}/python_script.cmake")
set_tests_properties(python_package PROPERTIES LABELS python TIMEOUT 300 SKIP_REGULAR_EXPRESSION "SKIPPED: ")
