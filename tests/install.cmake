# Somebody else's project builds against the installed tree: with the CMake package, and with pkg-config alone.
set(tree ${CMAKE_CURRENT_BINARY_DIR}/install)
set(common -DSOURCE=${CMAKE_CURRENT_SOURCE_DIR}/install/example -DBUILD=${PROJECT_BINARY_DIR} -DTREE=${tree}
           -DLIBDIR=${CMAKE_INSTALL_LIBDIR} -DBINDIR=${CMAKE_INSTALL_BINDIR} -DCXX=${CMAKE_CXX_COMPILER}
           -DPLUGIN=$<TARGET_EXISTS:ggml-turboquant> -DTQ=$<TARGET_EXISTS:tq>)
foreach(step IN ITEMS tree cmake pkgconfig)
    add_test(NAME install.${step}
             COMMAND ${CMAKE_COMMAND} -DSTEP=${step} ${common} -P ${CMAKE_CURRENT_SOURCE_DIR}/install/check.cmake)
endforeach()
set_tests_properties(install.tree PROPERTIES FIXTURES_SETUP install_tree TIMEOUT 120)
set_tests_properties(install.cmake install.pkgconfig PROPERTIES FIXTURES_REQUIRED install_tree TIMEOUT 120)
