// What the engine tells whoever counts. Called from the engine's thread: implementations are quick and thread-safe.
#pragma once

#include <cstdint>
#include <string_view>

namespace turboquant::serve {

class Observer {
public:
    virtual ~Observer() = default;
    virtual void prompt_placed(int64_t tokens, int64_t cached) = 0; // a prompt got its slot
    virtual void first_token(double seconds) = 0;                   // since the request came
    virtual void next_token(double seconds) = 0;                    // since the one before
    virtual void answer_over(std::string_view outcome) = 0;         // stop, length, cancelled, timeout, failed
};

} // namespace turboquant::serve
