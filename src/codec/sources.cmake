# Sources of src/codec: target_sources(turboquant PRIVATE ...) and per-file compile options (instruction sets).
