// Which slot a prompt goes to, so that as little as possible of it has to be read and of others' caches is lost.
#pragma once

#include "llm/model.h"

#include <cstdint>
#include <span>
#include <vector>

namespace turboquant::serve {

struct SlotView {
    std::span<const llm::Token> tokens; // in its cache, in order
    bool busy = false;
    int64_t last_used = 0; // grows with time
};

struct Placement {
    int slot = -1;    // -1: all are busy
    int64_t keep = 0; // tokens of the prompt that need not be read; never all of them, the last one's scores are needed
    int copy_from = -1; // the slot whose cache is copied first; -1: none
};

// The longest common prefix wins. A slot that holds much more than the prefix is left alone and its cache copied over the
// least recently used one, where the memory allows (can_copy); so is a busy slot's.
Placement place(std::span<const llm::Token> prompt, const std::vector<SlotView>& slots, bool can_copy);

} // namespace turboquant::serve
