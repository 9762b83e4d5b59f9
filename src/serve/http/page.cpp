#include "serve/http/page.h"

#include <random>
#include <string_view>

#include <fmt/format.h>

namespace turboquant::serve {

extern const char* const kPage; // page.html, through CMake

namespace {

std::string random_word() {
    std::random_device random;
    std::string word;
    for (int i = 0; i < 4; ++i) {
        word += fmt::format("{:08x}", random());
    }
    return word;
}

} // namespace

Page make_page() {
    const std::string nonce = random_word();
    const std::string_view source = kPage;
    Page page;
    size_t at = 0;
    while (at < source.size()) {
        size_t next = source.size();
        std::string_view tag;
        for (const std::string_view candidate : {"<script>", "<style>"}) {
            const size_t found = source.find(candidate, at);
            if (found < next) {
                next = found;
                tag = candidate;
            }
        }
        page.html += source.substr(at, next - at);
        if (!tag.empty()) {
            page.html += fmt::format("{} nonce=\"{}\">", tag.substr(0, tag.size() - 1), nonce);
        }
        at = next + tag.size();
    }
    page.policy = fmt::format("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
                              "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                              nonce);
    return page;
}

} // namespace turboquant::serve
