# Sources of src/cache: target_sources(turboquant PRIVATE ...) and per-file compile options (instruction sets).
target_sources(turboquant PRIVATE
    cache/condition.cpp
    cache/conditioner.cpp
    cache/native_row.cpp
    cache/page_memory.cpp
    cache/rows.cpp
    cache/store.cpp)
