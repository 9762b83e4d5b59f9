#include "attention/visibility.h"

#include "turboquant/layout.h"

#include <algorithm>

namespace turboquant::attention {
namespace {

constexpr uint16_t kHalfMinusInfinity = 0xfc00;
constexpr int64_t kSerialRows = 64 * 1024; // of the mask: fewer are read sooner than other threads wake up

Sight sight_of(const uint16_t* mask, int n) {
    uint16_t any = 0;
    uint16_t seen = 0;
    for (int r = 0; r < n; ++r) {
        any = static_cast<uint16_t>(any | mask[r]);
        seen = static_cast<uint16_t>(seen | (mask[r] ^ kHalfMinusInfinity));
    }
    return seen == 0 ? Sight::hidden : any == 0 ? Sight::clear : Sight::mixed;
}

} // namespace

void Visibility::collect(const AttentionCall& call, int group, int64_t chunk, int64_t n_chunks,
                         const ParallelFor& parallel) {
    n_tiles_ = (call.n_rows + kTileRows - 1) / kTileRows;
    sights_.resize(static_cast<size_t>(call.n_queries * n_tiles_));
    const auto read = [&](int64_t query) {
        for (int64_t tile = 0; tile < n_tiles_; ++tile) {
            const int valid = static_cast<int>(std::min<int64_t>(kTileRows, call.n_rows - tile * kTileRows));
            Sight sight = Sight::clear;
            int begin = 0;
            int end = valid;
            if (call.ranges != nullptr) {
                const RowRange& range = call.ranges[query];
                begin = static_cast<int>(std::clamp<int64_t>(range.begin - tile * kTileRows, 0, valid));
                end = static_cast<int>(std::clamp<int64_t>(range.end - tile * kTileRows, 0, valid));
            }
            if (begin >= end) {
                sight = Sight::hidden;
            } else if (call.mask != nullptr) {
                sight = sight_of(call.mask + query * call.mask_query_stride + tile * kTileRows + begin, end - begin);
            }
            if (end - begin < kTileRows && sight == Sight::clear) {
                sight = Sight::mixed; // the rows outside are to be hidden
            }
            sights_[static_cast<size_t>(query * n_tiles_ + tile)] = sight;
        }
    };
    if (call.mask == nullptr || call.n_queries * call.n_rows <= kSerialRows) {
        for (int64_t query = 0; query < call.n_queries; ++query) {
            read(query);
        }
    } else {
        parallel(call.n_queries, [&](int64_t query, int) { read(query); });
    }

    tiles_.clear();
    starts_.assign(1, 0);
    most_ = 0;
    const int64_t entries = call.n_queries * group;
    for (int64_t c = 0; c < n_chunks; ++c) {
        const int64_t first = c * chunk / group;
        const int64_t last = (std::min(entries, (c + 1) * chunk) - 1) / group;
        for (int64_t tile = 0; tile < n_tiles_; ++tile) {
            bool seen = false;
            for (int64_t query = first; query <= last && !seen; ++query) {
                seen = sight(query, tile) != Sight::hidden;
            }
            if (seen) {
                tiles_.push_back(static_cast<int32_t>(tile));
            }
        }
        starts_.push_back(static_cast<int64_t>(tiles_.size()));
        most_ = std::max(most_, count(c));
    }
}

} // namespace turboquant::attention
