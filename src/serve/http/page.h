// The web page at /, compiled in.
#pragma once

#include <string>

namespace turboquant::serve {

struct Page {
    std::string html;
    std::string policy; // Content-Security-Policy: nothing runs or loads but the page's own <script> and <style>
};

// With a new nonce each time.
Page make_page();

} // namespace turboquant::serve
