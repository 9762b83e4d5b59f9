// Tiles in any order, ranges instead of a mask, exact rows that the caller keeps: the same numbers, bit for bit, as a store
// whose rows lie in order, a mask, and exact rows of the store's own.
#include "attention_testing.h"

#include <numeric>

namespace turboquant::attention_tests {
namespace {

struct Paging {
    int head_size = 64;
    int bits = 4;
    int64_t rows = 333;
    int64_t queries = 5;
    int64_t sliding = 0; // rows a query sees; 0: all up to its own
    int window = 0;      // latest rows exact
    int sinks = 0;       // first rows exact
    bool conditioned = false;
    int workers = 1;
};

constexpr int kHeads = 2;
constexpr int kGroup = 3;

class Pages {
public:
    explicit Pages(const Paging& c) : c_(c), n_tiles_((c.rows + kTileRows - 1) / kTileRows) {
        const int n = c.head_size * kHeads;
        Conditioning conditioning;
        if (c.conditioned) {
            for (int i = 0; i < n; ++i) {
                conditioning.mu.push_back(normal());
                conditioning.lambda.push_back(std::exp2(0.3F * normal()));
            }
            for (int i = 0; i < c.head_size / 2; ++i) {
                conditioning.rope.push_back({static_cast<uint16_t>(i), static_cast<uint16_t>(i + c.head_size / 2),
                                             std::exp2(-0.2F * static_cast<float>(i))});
            }
        }
        // Twice the tiles, in another order; whatever is in the tiles between must not be seen.
        std::vector<int32_t> order(static_cast<size_t>(2 * n_tiles_));
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_);
        tiles_.assign(order.begin(), order.begin() + n_tiles_);
        for (const Side side : {Side::key, Side::value}) {
            const int s = side == Side::key ? 0 : 1;
            const Conditioning& used = side == Side::key ? conditioning : Conditioning{};
            EXPECT_TRUE(Store::create({side, c.head_size, kHeads, n_tiles_ * kTileRows}, {c.bits, c.window, c.sinks},
                                      used, plain_[s])
                            .ok());
            EXPECT_TRUE(
                Store::create({side, c.head_size, kHeads, 2 * n_tiles_ * kTileRows}, {.bits = c.bits}, used, paged_[s])
                    .ok());
            write(s, n);
        }
        q_.resize(static_cast<size_t>(c.queries * kHeads * kGroup * c.head_size));
        std::generate(q_.begin(), q_.end(), [this] { return normal(); });
        for (int64_t i = 0; i < c.queries; ++i) {
            const int64_t end = c.rows - c.queries + i + 1;
            ranges_.push_back({c.sliding > 0 ? std::max<int64_t>(0, end - c.sliding) : 0, end});
            for (int64_t r = 0; r < c.rows; ++r) {
                mask_.push_back(r >= ranges_.back().begin && r < end ? 0 : 0xfc00);
            }
        }
        const int64_t first_exact = std::max<int64_t>(c.rows - c.queries - c.window, 0);
        for (int64_t r = 0; r < c.rows; ++r) {
            if (c.window + c.sinks > 0 && (r < c.sinks || r >= first_exact)) {
                given_.push_back({r, raw_[0].data() + r * n, raw_[1].data() + r * n});
            }
        }
    }

    AttentionCall call(bool paged, std::vector<float>& out) const {
        AttentionCall a;
        a.q = q_.data();
        a.q_head_stride = c_.head_size;
        a.q_query_stride = int64_t{kHeads} * kGroup * c_.head_size;
        a.n_queries = c_.queries;
        a.n_heads = kHeads * kGroup;
        a.n_rows = c_.rows;
        a.scale = 1 / std::sqrt(static_cast<float>(c_.head_size));
        out.assign(q_.size(), 12345.0F);
        a.out = out.data();
        a.out_head_stride = a.q_head_stride;
        a.out_query_stride = a.q_query_stride;
        if (!paged) {
            a.mask = mask_.data();
            a.mask_query_stride = c_.rows;
            a.k_staging = &staging_[0];
            a.v_staging = &staging_[1];
            return a;
        }
        a.tiles = tiles_.data();
        a.ranges = ranges_.data();
        a.given = given_.data();
        a.n_given = static_cast<int64_t>(given_.size());
        a.given_sinks = c_.sinks;
        a.given_window = c_.window;
        return a;
    }

    const Store& store(bool paged, int side) const { return paged ? *paged_[side] : *plain_[side]; }

private:
    float normal() { return std::normal_distribution<float>()(random_); }

    void write(int side, int n) {
        std::vector<float> x(static_cast<size_t>(c_.rows * n));
        std::generate(x.begin(), x.end(), [this] { return 1.0F + normal(); });
        std::vector<int64_t> rows(static_cast<size_t>(c_.rows));
        std::iota(rows.begin(), rows.end(), 0);
        std::vector<int64_t> slots;
        std::vector<int32_t> positions(rows.begin(), rows.end());
        for (const int64_t r : rows) {
            slots.push_back(tiles_[static_cast<size_t>(r / kTileRows)] * int64_t{kTileRows} + r % kTileRows);
        }
        const int64_t before = c_.rows - c_.queries;
        Store& plain = *plain_[side];
        EXPECT_TRUE(plain.write(x.data(), n, rows.data(), before, {}, &staging_[side]).ok());
        for (int r = 0; r < c_.sinks; ++r) {
            EXPECT_TRUE(plain.pin(r, &staging_[side]).ok());
        }
        EXPECT_TRUE(plain.write(x.data() + before * n, n, rows.data() + before, c_.queries, {}, &staging_[side]).ok());
        EXPECT_TRUE(paged_[side]->write(x.data(), n, slots.data(), c_.rows, {}, nullptr, positions.data()).ok());
        for (size_t i = 0; i < x.size(); ++i) { // as the store has them: without the bits that a saved row's tag takes
            const bool tagged = i % static_cast<size_t>(n) < kTagElements;
            raw_[side].push_back(static_cast<uint16_t>(to_half(x[i]) & (tagged ? ~1U : ~0U)));
        }
    }

    Paging c_;
    int64_t n_tiles_;
    std::mt19937 random_{11};
    std::unique_ptr<Store> plain_[2];
    std::unique_ptr<Store> paged_[2];
    Staging staging_[2];
    std::vector<uint16_t> raw_[2];
    std::vector<int32_t> tiles_;
    std::vector<float> q_;
    std::vector<uint16_t> mask_;
    std::vector<RowRange> ranges_;
    std::vector<GivenRow> given_;
};

void check(const Paging& c) {
    const Pages pages(c);
    AttentionWorkspace workspace;
    Threads threads(c.workers);
    std::vector<float> want;
    std::vector<float> got;
    for (const Isa isa : available_isas()) {
        const AttentionCall plain = pages.call(false, want);
        ASSERT_TRUE(
            attend(pages.store(false, 0), pages.store(false, 1), plain, workspace, threads.parallel(), isa).ok());
        const AttentionCall paged = pages.call(true, got);
        const Status s = attend(pages.store(true, 0), pages.store(true, 1), paged, workspace, threads.parallel(), isa);
        ASSERT_TRUE(s.ok()) << s.message();
        EXPECT_EQ(got, want) << isa_name(isa) << " head size " << c.head_size << " queries " << c.queries;
    }
    const AttentionCall plain = pages.call(false, want);
    ASSERT_TRUE(attend_reference(pages.store(false, 0), pages.store(false, 1), plain).ok());
    const AttentionCall paged = pages.call(true, got);
    ASSERT_TRUE(attend_reference(pages.store(true, 0), pages.store(true, 1), paged).ok());
    EXPECT_EQ(got, want) << "reference";
}

TEST(AttentionPaging, TilesInAnyOrder) {
    check({});
    check({.head_size = 128, .bits = 3, .rows = 64, .queries = 1});
    check({.head_size = 80, .bits = 5, .rows = 129, .queries = 1});
    check({.head_size = 256, .bits = 8, .rows = 700, .queries = 2, .workers = 3});
    check({.rows = 300, .queries = 300, .workers = 2});
}

TEST(AttentionPaging, MeansOfBlocksFollowTheirRows) {
    check({.rows = 600, .conditioned = true});
    check({.head_size = 128, .rows = 333, .queries = 1, .window = 20, .conditioned = true});
}

TEST(AttentionPaging, RangesSlide) {
    check({.sliding = 100});
    check({.rows = 1000, .queries = 9, .sliding = 64, .workers = 2});
    check({.queries = 1, .sliding = 1});
    check({.queries = 150, .sliding = 70, .window = 30, .sinks = 3});
}

TEST(AttentionPaging, GivenRowsAreExact) {
    check({.window = 32, .sinks = 4});
    check({.queries = 1, .window = 1});
    check({.queries = 1, .sinks = 4});
    check({.head_size = 128, .bits = 2, .rows = 200, .queries = 16, .window = 90, .sinks = 1, .workers = 2});
}

TEST(AttentionPaging, RefusesInWords) {
    const Pages pages({.window = 32, .sinks = 4});
    AttentionWorkspace workspace;
    std::vector<float> out;
    const auto refused = [&](bool paged_store, auto&& change) {
        AttentionCall call = pages.call(true, out);
        change(call);
        return attend(pages.store(paged_store, 0), pages.store(paged_store, 1), call, workspace, {}, Isa::portable)
            .message();
    };
    const auto nothing = [](AttentionCall&) {};
    EXPECT_NE(refused(false, nothing).find("exact rows of their own"), std::string::npos);
    std::vector<int32_t> tiles(6, 0);
    tiles[2] = 999;
    EXPECT_NE(refused(true, [&](AttentionCall& c) { c.tiles = tiles.data(); }).find("tiles[2] is 999"),
              std::string::npos);
    EXPECT_NE(refused(true, [](AttentionCall& c) { c.ranges = nullptr; }).find("ranges null"), std::string::npos);
    std::vector<GivenRow> given(2, {7, reinterpret_cast<const uint16_t*>(out.data()), nullptr});
    EXPECT_NE(refused(true,
                      [&](AttentionCall& c) {
                          c.given = given.data();
                          c.n_given = 2;
                      })
                  .find("given[0] is row 7"),
              std::string::npos);
}

} // namespace
} // namespace turboquant::attention_tests
