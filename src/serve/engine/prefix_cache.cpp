#include "serve/engine/prefix_cache.h"

#include <algorithm>

namespace turboquant::serve {
namespace {

// Tokens that a copy must save to be worth it: every chat of a model begins with the same few.
constexpr int64_t kCopyGain = 64;

} // namespace

Placement place(std::span<const llm::Token> prompt, const std::vector<SlotView>& slots, bool can_copy) {
    std::vector<int64_t> common;
    int source = -1; // longest prefix of all
    int own = -1;    // longest prefix among the idle ones
    int victim = -1; // idle, least worth keeping: empty, else least recently used
    const auto size = static_cast<int>(slots.size());
    for (int i = 0; i < size; ++i) {
        const SlotView& slot = slots[static_cast<size_t>(i)];
        common.push_back(std::min(llm::common_prefix(prompt, slot.tokens), static_cast<int64_t>(prompt.size()) - 1));
        const int64_t n = common.back();
        const auto value = [&](int other) {
            const SlotView& view = slots[static_cast<size_t>(other)];
            return view.tokens.empty() ? int64_t{-1} : view.last_used;
        };
        if (source < 0 || n > common[static_cast<size_t>(source)]) {
            source = i;
        }
        if (!slot.busy && (victim < 0 || value(i) < value(victim))) {
            victim = i;
        }
        // Of equal ones the less recently used.
        if (!slot.busy && (own < 0 || n > common[static_cast<size_t>(own)] ||
                           (n == common[static_cast<size_t>(own)] && value(i) < value(own)))) {
            own = i;
        }
    }
    if (victim < 0) {
        return {};
    }
    const auto at = [&](int i) { return common[static_cast<size_t>(i)]; };
    const auto held = static_cast<int64_t>(slots[static_cast<size_t>(own)].tokens.size());
    // The conversation in `own` goes on, or it loses no more than what is reused of it.
    const bool in_place = own == victim || held <= 2 * at(own) || (!can_copy && at(own) >= kCopyGain);
    const int target = in_place ? own : victim;
    if (can_copy && source != victim && at(source) >= at(target) + kCopyGain) {
        return {victim, at(source), source};
    }
    return {target, at(target), -1};
}

} // namespace turboquant::serve
