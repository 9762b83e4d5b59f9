// Which tokens of a sequence a prefill needs as codes and which as exact rows. Internal.
//
// A query whose tokens end at `e` sees token p exactly if p < sinks, or if p is among the latest `window` up to the
// query and still held by the ring; otherwise as codes. (Decoding asks for a ring that holds them all.)
#pragma once

#include "cuda/prefill.h"

namespace turboquant::cuda {

struct Extent {
    int length;
    int first_end;    // tokens that the first query sees; may be <= 0
    int held;         // from here on the ring holds tokens
    int n_sinks;      // of the exact rows: sinks first,
    int window_begin; // then positions from here on
    int n_exact;
    bool too_long; // for the workspace: the output says so with NaN

    __device__ __forceinline__ Extent(const PrefillArgs& a, int sequence) {
        too_long = a.lengths[sequence] > a.max_length;
        length = min(a.lengths[sequence], a.max_length);
        first_end = a.causal != 0 ? length - a.q_len + 1 : length;
        held = max(length - a.ring, 0);
        n_sinks = min(a.sinks, length);
        window_begin = a.window > 0 ? max(max(first_end - a.window, held), a.sinks) : length;
        n_exact = n_sinks + max(length - window_begin, 0);
    }

    // Tokens from here on are exact for a query whose tokens end at `end`.
    __device__ __forceinline__ int exact_from(const PrefillArgs& a, int end) const {
        return a.window > 0 ? max(end - a.window, held) : 0x7fffffff;
    }
    __device__ __forceinline__ int code_end(const PrefillArgs& a, int end) const {
        return min(end, exact_from(a, end));
    }
    __device__ __forceinline__ int lowest(const PrefillArgs& a, int end) const {
        return a.sliding_window > 0 ? max(end - a.sliding_window, 0) : 0;
    }
    // Of exact row i.
    __device__ __forceinline__ int position(int i) const { return i < n_sinks ? i : window_begin + i - n_sinks; }
};

} // namespace turboquant::cuda
