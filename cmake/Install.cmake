# cmake --install: headers, libturboquant, its CMake package and pkg-config file, and the program. src/ggml installs the
# plug-in.
include(CMakePackageConfigHelpers)

if(SKBUILD) # pip: the Python package takes the libraries that it loads, and nothing else (python/pyproject.toml)
    install(TARGETS turboquant_cpu LIBRARY DESTINATION turboquant COMPONENT python)
    if(TARGET turboquant_cuda)
        set_property(TARGET turboquant_cuda PROPERTY VERSION) # a wheel has no links: each name would be a copy
        set_property(TARGET turboquant_cuda PROPERTY SOVERSION)
        install(TARGETS turboquant_cuda LIBRARY DESTINATION turboquant COMPONENT python)
    endif()
    return()
endif()

set(TURBOQUANT_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/turboquant DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h")
set_target_properties(turboquant PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
install(TARGETS turboquant EXPORT turboquantTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT turboquantTargets NAMESPACE turboquant:: DESTINATION ${TURBOQUANT_CMAKE_DIR})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/turboquantConfig.cmake.in
                              ${PROJECT_BINARY_DIR}/turboquantConfig.cmake
                              INSTALL_DESTINATION ${TURBOQUANT_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/turboquantConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/turboquantConfig.cmake ${PROJECT_BINARY_DIR}/turboquantConfigVersion.cmake
        DESTINATION ${TURBOQUANT_CMAKE_DIR})

# The prefix is worked out from the .pc file's own place, so that an installed tree can be moved.
file(RELATIVE_PATH TURBOQUANT_PC_UP /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
# A static library's users link what it needs; a shared one brings it along.
get_target_property(turboquant_type turboquant TYPE)
set(TURBOQUANT_PC_LIBS "")
set(TURBOQUANT_PC_LIBS_PRIVATE "")
if(turboquant_type STREQUAL "STATIC_LIBRARY")
    set(TURBOQUANT_PC_LIBS " -lstdc++ -lm -pthread")
else()
    set(TURBOQUANT_PC_LIBS_PRIVATE "-lstdc++ -lm -pthread")
endif()
configure_file(${PROJECT_SOURCE_DIR}/cmake/turboquant.pc.in ${PROJECT_BINARY_DIR}/turboquant.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/turboquant.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

# The program finds libllama where it was linked, and libraries of ours beside it.
if(TARGET tq)
    file(RELATIVE_PATH up /prefix/${CMAKE_INSTALL_BINDIR} /prefix/${CMAKE_INSTALL_LIBDIR})
    set_target_properties(tq PROPERTIES INSTALL_RPATH "$ORIGIN/${up}" INSTALL_RPATH_USE_LINK_PATH ON)
    install(TARGETS tq RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
    unset(up)
endif()
