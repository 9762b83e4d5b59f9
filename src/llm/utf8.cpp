#include "llm/utf8.h"

namespace turboquant::llm {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

enum class Parse { whole, incomplete, invalid };

// Looks at the character that starts at text[at]; length: its bytes, or for an invalid one the bytes to skip.
// Table 3-7 of the Unicode standard: no overlong forms, no surrogates, nothing above U+10FFFF.
Parse parse_char(std::string_view text, size_t at, size_t& length) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const unsigned char lead = byte(0);
    length = 1;
    if (lead < 0x80) {
        return Parse::whole;
    }
    size_t size = 0;
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
        size = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        size = 3;
        low = lead == 0xE0 ? 0xA0 : 0x80;
        high = lead == 0xED ? 0x9F : 0xBF;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        size = 4;
        low = lead == 0xF0 ? 0x90 : 0x80;
        high = lead == 0xF4 ? 0x8F : 0xBF;
    } else {
        return Parse::invalid;
    }
    for (size_t i = 1; i < size; ++i) {
        if (at + i >= text.size()) {
            length = i;
            return Parse::incomplete;
        }
        if (byte(i) < low || byte(i) > high) {
            length = i;
            return Parse::invalid;
        }
        low = 0x80;
        high = 0xBF;
    }
    length = size;
    return Parse::whole;
}

} // namespace

std::string Utf8Stream::push(std::string_view bytes) {
    pending_ += bytes;
    std::string out;
    size_t at = 0;
    while (at < pending_.size()) {
        size_t length = 0;
        const Parse parse = parse_char(pending_, at, length);
        if (parse == Parse::incomplete) {
            break;
        }
        if (parse == Parse::whole) {
            out.append(pending_, at, length);
        } else {
            out += kReplacement;
        }
        at += length;
    }
    pending_.erase(0, at);
    return out;
}

std::string Utf8Stream::finish() {
    const bool incomplete = !pending_.empty();
    pending_.clear();
    return incomplete ? std::string(kReplacement) : std::string();
}

size_t first_invalid_utf8(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        size_t length = 0;
        if (text[at] == '\0' || parse_char(text, at, length) != Parse::whole) {
            return at;
        }
        at += length;
    }
    return std::string_view::npos;
}

} // namespace turboquant::llm
