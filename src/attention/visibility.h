// Which tiles the queries of a call see, read from the mask once, before the work is shared out. Internal: not installed.
#pragma once

#include "turboquant/attention.h"

#include <cstdint>
#include <vector>

namespace turboquant::attention {

// What a query sees of a tile.
enum class Sight : uint8_t {
    hidden,
    clear,
    mixed, // the mask says
};

// Reused between calls.
class Visibility {
public:
    // `chunk`: entries a chunk; entry m is a head of query m / group (plan.h). May throw bad_alloc.
    void collect(const AttentionCall& call, int group, int64_t chunk, int64_t n_chunks, const ParallelFor& parallel);

    Sight sight(int64_t query, int64_t tile) const { return sights_[static_cast<size_t>(query * n_tiles_ + tile)]; }
    // The tiles that some query of a chunk sees, in order.
    const int32_t* tiles(int64_t chunk) const { return tiles_.data() + starts_[static_cast<size_t>(chunk)]; }
    int64_t count(int64_t chunk) const {
        return starts_[static_cast<size_t>(chunk) + 1] - starts_[static_cast<size_t>(chunk)];
    }
    int64_t most() const { return most_; } // tiles of any chunk

private:
    int64_t n_tiles_ = 0;
    int64_t most_ = 0;
    std::vector<Sight> sights_; // [query][tile]
    std::vector<int32_t> tiles_;
    std::vector<int64_t> starts_; // [chunk], and one more: where in tiles_
};

} // namespace turboquant::attention
