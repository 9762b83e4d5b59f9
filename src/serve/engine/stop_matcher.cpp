#include "serve/engine/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace turboquant::serve {

std::string StopMatcher::push(std::string_view text) {
    if (stopped_) {
        return {};
    }
    pending_ += text;
    size_t found = std::string::npos;
    for (const std::string& stop : stops_) {
        found = std::min(found, pending_.find(stop));
    }
    if (found != std::string::npos) {
        stopped_ = true;
        std::string out = pending_.substr(0, found);
        pending_.clear();
        return out;
    }
    // The longest end of the text that is a beginning of a stop string.
    size_t kept = 0;
    for (const std::string& stop : stops_) {
        for (size_t n = std::min(stop.size() - 1, pending_.size()); n > kept; --n) {
            if (std::string_view(pending_).substr(pending_.size() - n) == std::string_view(stop).substr(0, n)) {
                kept = n;
                break;
            }
        }
    }
    std::string out = pending_.substr(0, pending_.size() - kept);
    pending_.erase(0, out.size());
    return out;
}

std::string StopMatcher::finish() {
    return std::exchange(pending_, {});
}

} // namespace turboquant::serve
