// What a graph says about the RoPE of the keys it writes: which channels turn together, how fast, and at which
// positions. Read from the operations before a SET_ROWS, so that any model, layout and scaling is covered without naming
// one.
#pragma once

#include "abi.h"

#include "turboquant/conditioning.h"
#include "turboquant/status.h"

#include <cstdint>
#include <vector>

namespace turboquant::plugin {

struct RopeTrace {
    enum class Kind {
        turns,
        still,  // keys are computed without RoPE: they do not turn
        unknown // the chain of operations ends in a copy, as on hosts whose weights are on another device
    };
    struct Part {
        const ggml_tensor* op = nullptr; // a ROPE
        int first_channel = 0;           // of the head, where that ROPE's channel 0 lies
    };
    Kind kind = Kind::unknown;
    std::vector<Part> parts;
    const ggml_tensor* positions = nullptr; // one I32 a row, or several in sections of which the first counts

    // Of everything that the pairs depend on but the frequency factors' values, which a context never changes: equal
    // signatures have equal pairs.
    void signature(std::vector<int32_t>& out) const;
};

// How the keys of a tensor turn, as far as a graph has said.
struct RopeFacts {
    bool known = false; // the graph has been read
    RopeTrace::Kind kind = RopeTrace::Kind::unknown;
    std::vector<RopePair> pairs;
    std::vector<int32_t> signature;
};

// Follows op->src[0] of a SET_ROWS into a tensor whose heads have `head_size` channels. Borrows from the graph. `trace`
// is overwritten; done for every key tensor of every token, so its memory is used again.
void trace_rope(const ggml_tensor* set_rows, int head_size, RopeTrace& trace);

// The pairs of a head: each ROPE of the trace is run by `cpu` (the host's CPU back end) on unit vectors at position 1,
// and the turns are read off the result. Pairs that do not turn are left out. Error: the back end fails.
Status rope_pairs(const RopeTrace& trace, ggml_backend_t cpu, std::vector<RopePair>& pairs);

// Positions of `n` rows. False (and empty) when they cannot be right: another number of them, negative, above 2^24 (the
// memory of a graph's inputs is reused once nothing in the graph needs them any more).
bool read_positions(const ggml_tensor* positions, int64_t n, std::vector<int32_t>& out);

// Whether two lists of pairs say the same: same channels, thetas within a thousandth.
bool same_turns(const std::vector<RopePair>& a, const std::vector<RopePair>& b);

} // namespace turboquant::plugin
