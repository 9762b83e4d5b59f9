#include "llm/log.h"

#include <algorithm>
#include <cstdio>
#include <mutex>

#include <llama.h>

namespace turboquant::llm {

struct LogState {
    std::mutex mutex;
    bool verbose = false;
    LogLevel level = LogLevel::info;
    std::string partial; // a line that has not ended yet
    std::vector<LogCapture*> captures;

    void finish_line() {
        for (LogCapture* capture : captures) {
            capture->lines_.push_back({level, partial});
        }
        partial.clear();
    }

    void write(ggml_log_level ggml_level, const char* text) {
        const std::lock_guard lock(mutex);
        if (verbose && ggml_level != GGML_LOG_LEVEL_DEBUG) {
            std::fputs(text, stderr);
        }
        if (ggml_level != GGML_LOG_LEVEL_CONT) {
            if (!partial.empty()) {
                finish_line();
            }
            level = ggml_level == GGML_LOG_LEVEL_ERROR   ? LogLevel::error
                    : ggml_level == GGML_LOG_LEVEL_WARN  ? LogLevel::warn
                    : ggml_level == GGML_LOG_LEVEL_DEBUG ? LogLevel::debug
                                                         : LogLevel::info;
        }
        for (; *text != '\0'; ++text) {
            if (*text == '\n') {
                finish_line();
            } else {
                partial += *text;
            }
        }
    }
};

namespace {

LogState& state() {
    static LogState instance;
    return instance;
}

void on_log(ggml_log_level level, const char* text, void* /*user*/) {
    state().write(level, text);
}

} // namespace

void install_log(bool verbose) {
    state().verbose = verbose;
    llama_log_set(on_log, nullptr); // sets ggml's too
}

LogCapture::LogCapture() {
    const std::lock_guard lock(state().mutex);
    state().captures.push_back(this);
}

LogCapture::~LogCapture() {
    const std::lock_guard lock(state().mutex);
    std::erase(state().captures, this);
}

std::vector<LogLine> LogCapture::lines() const {
    const std::lock_guard lock(state().mutex);
    return lines_;
}

std::string LogCapture::reason(const char* otherwise) const {
    const std::string found = failure_reason(lines());
    return found.empty() ? std::string(otherwise) : found;
}

} // namespace turboquant::llm
