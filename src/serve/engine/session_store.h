// Where conversations' caches go that have no place in memory any more: the seam between the engine and what keeps them
// (files, in tq serve --session-dir).
#pragma once

#include "llm/model.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace turboquant::serve {

// Tokens of a sequence that is worth a place in a store: a shorter one is read again as fast as it is fetched. The engine
// neither saves nor asks for fewer.
constexpr int64_t kWorthSaving = 64;

// One sequence as llama_state_seq_get_data() gave it, and the tokens that its rows belong to, in order.
struct SavedSequence {
    std::vector<llm::Token> tokens;
    std::vector<uint8_t> state;
};

// Made for one model and one kind of cache: states of others must never come out of it. The engine calls it from its own
// thread, between two steps, so every call stalls all running streams: load() should take milliseconds where nothing
// fits (an index in memory), and save() should hand the bytes to a thread of the store's own. Neither throws: a file
// that cannot be read or written is the store's to report, and the prompt is then simply read again.
class SessionStore {
public:
    virtual ~SessionStore() = default;

    // The saved sequence that shares the longest prefix with `tokens`, if that prefix is longer than `more_than`
    // tokens. The engine drops what follows the common prefix itself. Nothing: there is none, or it was damaged.
    virtual std::optional<SavedSequence> load(std::span<const llm::Token> tokens, int64_t more_than) = 0;

    // Takes a sequence over. Called when a conversation gives its slot to another, when a slot has been idle for a while
    // and when the server ends. The same conversation comes again as it grows: one that continues a saved one replaces it.
    virtual void save(std::span<const llm::Token> tokens, std::vector<uint8_t> state) = 0;

    // What load() gave cannot be used here, for the reason given: load() must not find these tokens again until they are saved again.
    virtual void forget(std::span<const llm::Token> tokens, std::string_view reason) = 0;

    // Returns when all that was given to save() is on disk. Called once, at the end, from any thread.
    virtual void flush() {}
};

} // namespace turboquant::serve
