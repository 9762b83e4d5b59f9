// What the kernels of decoding and of prefill are both told of a call. Internal.
#pragma once

#include <cstdint>

namespace turboquant::cuda {

struct CallArgs {
    const uint8_t* pages;
    const float* mu; // null where its part of the scores is in the kernel's `offsets`
    const float* lambda;
    const uint16_t* exact_keys;
    const uint16_t* exact_values;
    const void* q;
    void* out;
    const int32_t* page_table;
    const int32_t* lengths;
    const int32_t* sequence_slots;
    const float* sink_logits;
    int64_t q_batch, q_query, q_head;
    int64_t out_batch, out_query, out_head;
    int64_t page_table_stride;
    int64_t page_bytes;
    int32_t type;
    int32_t q_len, kv_heads, group;
    int32_t page_size, page_shift;
    int32_t key_bits, value_bits;
    int32_t tile_bytes;
    int32_t sinks, ring, window, sliding_window;
    int32_t mu_blocks; // 0: one mean for all positions
    int32_t causal;
    uint32_t signs[8];  // of the rotation, bit c % 32 of word c / 32: channel c is negated
    float scale_log2;   // of scores, into units of log2; with soft-cap: scale / softcap
    float softcap_log2; // 0: none; else softcap * log2(e)
};

} // namespace turboquant::cuda
