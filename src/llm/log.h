// libllama's and ggml's log, which is process-wide. Nothing reaches the terminal unless `verbose` is set; the newest
// lines are collected where someone asks, to explain failures and to read sizes from.
#pragma once

#include "llm/log_lines.h"

#include <vector>

namespace turboquant::llm {

// Installs the log callback. Call once, before anything else of libllama.
void install_log(bool verbose);

// Collects all lines while it lives. Nestable; a line goes to every living one. Thread-safe.
class LogCapture {
public:
    LogCapture();
    ~LogCapture();
    LogCapture(const LogCapture&) = delete;
    LogCapture& operator=(const LogCapture&) = delete;

    std::vector<LogLine> lines() const;
    LoggedMemory memory() const { return read_memory_log(lines()); }
    // failure_reason(), or `otherwise` if the log has no error.
    std::string reason(const char* otherwise) const;

private:
    friend struct LogState;
    std::vector<LogLine> lines_;
};

} // namespace turboquant::llm
