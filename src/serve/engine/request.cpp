#include "serve/engine/request.h"

#include <utility>

namespace turboquant::serve {

void AnswerStream::push(Event event) {
    {
        const std::lock_guard lock(mutex_);
        events_.push_back(std::move(event));
    }
    changed_.notify_one();
}

std::deque<Event> AnswerStream::take(std::chrono::milliseconds wait) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, wait, [&] { return !events_.empty(); });
    return std::exchange(events_, {});
}

} // namespace turboquant::serve
