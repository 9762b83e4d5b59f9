// Finds stop strings in a text that comes in pieces, without letting any part of one out.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace turboquant::serve {

class StopMatcher {
public:
    // stops: none of them empty.
    explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

    // The text that is certain to come before any stop string: what could still become the beginning of one is kept.
    // After stopped() nothing comes any more.
    std::string push(std::string_view text);
    // What is left at the end of the answer, where no stop string came.
    std::string finish();

    bool stopped() const { return stopped_; }

private:
    std::vector<std::string> stops_;
    std::string pending_;
    bool stopped_ = false;
};

} // namespace turboquant::serve
