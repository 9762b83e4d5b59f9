// Collects the statistics that a profile is made of. A program that wants one asks the plug-in's registry for
// "turboquant_tune_start" and "turboquant_tune_write"; what any context's caches see in between is added up by layer.
#pragma once

#include "rope.h"

#include <cstdint>
#include <string>
#include <vector>

namespace turboquant::plugin {

// Positions below this are not counted in any statistics: attention sinks are like no other row.
inline constexpr int32_t kFirstPosition = 4;

// A key row and the queries of the same token.
struct SeenRow {
    const float* key = nullptr; // [kv_head][channel]
    int32_t position = 0;
    const float* q = nullptr; // of query head 0
    int64_t q_head_stride = 0;
    int n_heads = 0;
    float scale = 1;                                // of the scores <q, k>
    bool finite(int head_size, int kv_heads) const; // neither key nor queries have NaN, infinity or values above fp16
};
// Adds a finite row at kFirstPosition or later to the statistics.
void add_row(const SeenRow& row, int head_size, int kv_heads, KeyStatistics& statistics);

bool tuning();
// While tuning: adds one row to its layer. Thread-safe.
void tune_row(int layer, int head_size, int kv_heads, const RopeFacts& facts, const SeenRow& row);

// What the registry hands out. Null, or an error message that stays valid until the thread's next call. Thread-safe.
// Starting again forgets what was collected; writing ends the collection also when it fails.
extern "C" const char* turboquant_tune_start();
extern "C" const char* turboquant_tune_write(const char* path, const char* model, const char* text);

} // namespace turboquant::plugin
