// What the program reads out of libllama's log: the public API has no call for these.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant::llm {

enum class LogLevel { debug, info, warn, error };

struct LogLine {
    LogLevel level = LogLevel::info;
    std::string text; // one line, no newline
};

// One llama_kv_cache that libllama made: a model with sliding windows has two.
struct LoggedCache {
    bool sliding = false;
    int64_t cells = 0;
    std::vector<int> layers; // layers whose K and V lie in it
    std::string key_type;
    std::string value_type;
    double key_mib = 0; // by tensor shape and type, rounded to 0.01
    double value_mib = 0;
};

struct LoggedMemory {
    std::vector<LoggedCache> caches;
    double kv_buffer_mib = 0; // as allocated, all back ends together
    double recurrent_mib = 0; // state of recurrent layers
    std::vector<int> recurrent_layers;
    double compute_mib = 0;
};

// Lines of one context's creation (debug level included). Lines that mean nothing here are skipped.
LoggedMemory read_memory_log(const std::vector<LogLine>& lines);

// The one line that explains a failure: the plug-in's own words if it spoke, else the first error, without the name of
// the function that wrote it. Empty if there is none.
std::string failure_reason(const std::vector<LogLine>& lines);

} // namespace turboquant::llm
