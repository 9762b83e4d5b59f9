// The two steps of a job: its tasks, and the merging of what they found. Internal: not installed.
#pragma once

#include "attention/scratch.h"

#include <cstdint>

namespace turboquant::attention {

// Entries [first, first + count) of a KV head over some of the tiles that they see; what they find goes to `sums`.
void run_tiles(const Job& job, Scratch& scratch, int kv_head, int64_t first, int count, Sums sums, const int32_t* tiles,
               int64_t n_tiles);

// Merges what the tile ranges found about one entry, in order, and writes its output. parts[i] has it at `index`.
void finish(const Job& job, Scratch& s, int kv_head, int64_t entry, const Sums* parts, int64_t n_parts, int64_t index);

} // namespace turboquant::attention
