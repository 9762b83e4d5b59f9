# Sources of src/capi.
target_sources(turboquant PRIVATE capi/capi.cpp capi/guard.cpp capi/openmp.cpp capi/paged.cpp)
set_source_files_properties(capi/capi.cpp PROPERTIES COMPILE_DEFINITIONS "TURBOQUANT_VERSION=\"${PROJECT_VERSION}\"")
