// What a call of the library came to. The library never prints and never aborts: a failure is a value with one
// sentence (what, where, what to do next), and the caller decides what becomes of it.
#pragma once

#include <string>
#include <utility>

namespace turboquant {

enum class StatusCode { ok, invalid_argument, out_of_memory, unsupported, internal };

class [[nodiscard]] Status {
public:
    Status() = default;
    Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

    bool ok() const { return code_ == StatusCode::ok; }
    StatusCode code() const { return code_; }
    const std::string& message() const { return message_; }

private:
    StatusCode code_ = StatusCode::ok;
    std::string message_;
};

inline Status invalid(std::string message) {
    return {StatusCode::invalid_argument, std::move(message)};
}

} // namespace turboquant
