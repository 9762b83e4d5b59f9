// UTF-8 in pieces: what a model streams may end in the middle of a character, what a user pipes in may be anything.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace turboquant::llm {

// Collects bytes and gives out whole characters only. Bytes that can never become a character come out as U+FFFD.
class Utf8Stream {
public:
    // The characters that `bytes` completed (may be empty).
    std::string push(std::string_view bytes);
    // What is left at the end: U+FFFD if a character stayed incomplete.
    std::string finish();

private:
    std::string pending_;
};

// Offset of the first byte that is not UTF-8 (or is a NUL byte, which no prompt can hold); npos when all is well.
size_t first_invalid_utf8(std::string_view text);

} // namespace turboquant::llm
