# Sources of src/attention: target_sources(turboquant PRIVATE ...) and per-file compile options (instruction sets).
