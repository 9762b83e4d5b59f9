// One line a request on standard error, as text or JSON. Never what was asked or answered, unless that was wished for.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace turboquant::serve {

struct RequestRecord {
    std::string id;
    std::string method;
    std::string path;
    std::string remote;
    int status = 0;
    std::chrono::steady_clock::time_point start;
    // Completions only.
    std::optional<int64_t> prompt_tokens;
    int64_t cached_tokens = 0;
    int64_t answer_tokens = 0;
    std::string outcome;             // stop, length, cancelled, ...
    std::string error;               // code or message of an ApiError
    std::string prompt;              // with --log-prompts
    std::shared_ptr<void> in_flight; // counts as being answered while it lives
};

class RequestLog {
public:
    enum class Format { text, json, none };
    explicit RequestLog(Format format) : format_(format) {}

    // Thread-safe, one line each.
    void request(const RequestRecord& record);
    void notice(const std::string& message);
    void failure(const std::string& id, const std::string& message);

private:
    void write(const std::string& line);

    Format format_;
    std::mutex mutex_;
};

} // namespace turboquant::serve
