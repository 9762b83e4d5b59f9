// Which tiles a call reads, and how they are shared out.
#include "attention_testing.h"

#include "attention/plan.h"
#include "attention/visibility.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

namespace turboquant::attention_tests {
namespace {

using attention::Sight;
using attention::Visibility;

constexpr uint16_t kHidden = 0xfc00;

struct TileMask {
    int64_t queries;
    int64_t rows;
    int64_t stride;
    std::vector<uint16_t> values;

    TileMask(int64_t n_queries, int64_t n_rows, uint16_t value)
        : queries(n_queries),
          rows(n_rows),
          stride(n_rows + 5),
          values(static_cast<size_t>(n_queries * stride), value) {}
    uint16_t& at(int64_t query, int64_t row) { return values[static_cast<size_t>(query * stride + row)]; }
    AttentionCall call() const {
        AttentionCall c;
        c.n_queries = queries;
        c.n_rows = rows;
        c.mask = values.data();
        c.mask_query_stride = stride;
        return c;
    }
};

std::vector<int32_t> tiles_of(const Visibility& v, int64_t chunk) {
    return {v.tiles(chunk), v.tiles(chunk) + v.count(chunk)};
}

TEST(Visibility, IsWhatTheMaskSays) {
    std::mt19937 random(1);
    Visibility visibility; // one for all: nothing of an earlier call may stay
    for (const int64_t rows : {1, 63, 64, 65, 500, 1024}) {
        for (const auto& [group, chunk] : {std::pair{1, 1}, {3, 3}, {4, 8}, {5, 3}}) {
            TileMask mask(7, rows, kHidden);
            for (int i = 0; i < 12; ++i) { // runs of rows: tiles of all three kinds
                const int64_t query = static_cast<int64_t>(random() % 7);
                const int64_t first = static_cast<int64_t>(random() % static_cast<unsigned>(rows));
                const int64_t end = std::min<int64_t>(rows, first + 1 + static_cast<int64_t>(random() % 200));
                for (int64_t r = first; r < end; ++r) {
                    mask.at(query, r) = random() % 500 == 0 ? 0xb800 : 0;
                }
            }
            const int64_t entries = 7 * group;
            const int64_t n_chunks = (entries + chunk - 1) / chunk;
            visibility.collect(mask.call(), group, chunk, n_chunks, {});
            const int64_t n_tiles = (rows + kTileRows - 1) / kTileRows;
            int64_t most = 0;
            for (int64_t c = 0; c < n_chunks; ++c) {
                std::set<int32_t> expected;
                for (int64_t m = c * chunk; m < std::min(entries, (c + 1) * chunk); ++m) {
                    for (int64_t r = 0; r < rows; ++r) {
                        if (mask.at(m / group, r) != kHidden) {
                            expected.insert(static_cast<int32_t>(r / kTileRows));
                        }
                    }
                }
                EXPECT_EQ(tiles_of(visibility, c), std::vector<int32_t>(expected.begin(), expected.end()));
                most = std::max(most, static_cast<int64_t>(expected.size()));
            }
            EXPECT_EQ(visibility.most(), most);
            for (int64_t q = 0; q < 7; ++q) {
                for (int64_t t = 0; t < n_tiles; ++t) {
                    int hidden = 0;
                    int plain = 0;
                    for (int64_t r = t * kTileRows; r < (t + 1) * kTileRows; ++r) {
                        hidden += r >= rows || mask.at(q, r) == kHidden;
                        plain += r < rows && mask.at(q, r) == 0;
                    }
                    const Sight expected = hidden == kTileRows  ? Sight::hidden
                                           : plain == kTileRows ? Sight::clear
                                                                : Sight::mixed;
                    EXPECT_EQ(visibility.sight(q, t), expected) << "query " << q << " tile " << t << " rows " << rows;
                }
            }
        }
    }
}

TEST(Visibility, IsTheSameReadByManyThreads) {
    TileMask mask(300, 700, kHidden); // above what one thread reads alone
    for (int64_t q = 0; q < 300; ++q) {
        for (int64_t r = std::max<int64_t>(0, 2 * q - 90); r <= 2 * q; ++r) { // a sliding window
            mask.at(q, r) = 0;
        }
    }
    Threads pool(3);
    Visibility one;
    Visibility many;
    one.collect(mask.call(), 2, 32, 19, {});
    many.collect(mask.call(), 2, 32, 19, pool.parallel());
    for (int64_t c = 0; c < 19; ++c) {
        EXPECT_EQ(tiles_of(one, c), tiles_of(many, c));
        EXPECT_LE(one.count(c), 4) << "a window of 90 rows and 16 queries does not span more tiles";
    }
}

// Rows of others cost nothing, whatever lies in them and however the work is shared out.
TEST(Visibility, HiddenTilesAreNotRead) {
    for (const Isa isa : available_isas()) {
        Fixture setup({.rows = 64 * 40});
        TileMask mask(1, 64 * 40, kHidden);
        for (int64_t r = 64 * 17; r < 64 * 19; ++r) {
            mask.at(0, r) = 0;
        }
        AttentionWorkspace workspace;
        Threads pool(4);
        std::vector<float> alone;
        AttentionCall call = setup.call(alone);
        call.mask = mask.values.data();
        call.mask_query_stride = mask.stride;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        // What is never read can be anything: scales that turn every sum into NaN.
        for (Store* store : {&setup.k(), &setup.v()}) {
            for (int head = 0; head < store->shape().kv_heads; ++head) {
                for (int64_t tile = 0; tile < 40; ++tile) {
                    if (tile != 17 && tile != 18) {
                        std::fill_n(store->impl().tile_scales(head, tile), kTileRows, uint16_t{0x7e00});
                    }
                }
            }
        }
        std::vector<float> together;
        AttentionCall again = setup.call(together);
        again.mask = mask.values.data();
        again.mask_query_stride = mask.stride;
        ASSERT_TRUE(attend(setup.k(), setup.v(), again, workspace, pool.parallel(), isa).ok());
        ASSERT_EQ(alone.size(), together.size());
        for (size_t i = 0; i < alone.size(); ++i) {
            EXPECT_NEAR(alone[i], together[i], 1e-4F * (1 + std::abs(alone[i]))) << isa_name(isa);
        }
    }
}

TEST(PlanSplits, GiveEveryWorkerAShare) {
    Fixture setup({.rows = 64 * 600});
    std::vector<float> out;
    const AttentionCall call = setup.call(out);
    attention::Plan plan;
    ASSERT_TRUE(attention::make_plan(setup.k(), setup.v(), call, Isa::portable, plan).ok());
    const int64_t base = plan.tasks();
    for (const int workers : {1, 2, 3, 8, 64}) {
        attention::plan_splits(1, workers, plan); // nothing to split
        EXPECT_EQ(plan.n_splits, 1);
        attention::plan_splits(600, workers, plan);
        EXPECT_TRUE(plan.tasks() >= 4 * workers || plan.n_splits >= 600 / 32) << workers;
        EXPECT_LT(plan.tasks(), 4 * workers + base) << workers << ": more tasks than are of use";
    }
    attention::plan_splits(8, 64, plan); // short: no part below four tiles
    EXPECT_LE(plan.n_splits, 2);
}

} // namespace
} // namespace turboquant::attention_tests
