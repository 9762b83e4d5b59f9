// What this machine gives the process: memory and processors.
#pragma once

#include <cstdint>
#include <string>

namespace turboquant::llm {

struct FreeMemory {
    int64_t bytes = 0;  // < 0: unknown
    std::string source; // "free memory" or "the cgroup's limit"
};

// MemAvailable, or what the process' control groups leave where that is less. Page cache counts as free.
// root: where /proc and /sys are found; tests give a folder of their own.
FreeMemory free_memory(const std::string& root = "");

// Physical cores that the process may run on (hyper-threads counted once), at least 1.
int default_threads();

} // namespace turboquant::llm
