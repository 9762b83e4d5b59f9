// Errors of the program: one line each, saying what, where and what to do next.
#pragma once

#include <stdexcept>
#include <string>

namespace turboquant::llm {

// Something failed: exit status 1.
class Error : public std::runtime_error {
public:
    explicit Error(const std::string& message) : std::runtime_error(message) {}
};

// The caller asked for something that makes no sense: exit status 2.
class UsageError : public Error {
public:
    explicit UsageError(const std::string& message) : Error(message) {}
};

} // namespace turboquant::llm
