# Sources of src/capi: target_sources(turboquant PRIVATE ...) and per-file compile options (instruction sets).
