# Sources of src/cache: target_sources(turboquant PRIVATE ...) and per-file compile options (instruction sets).
