// Each thing that attention can do, alone, on every instruction set, against an oracle that knows no tiles.
#include "attention_testing.h"

namespace turboquant::attention_tests {
namespace {

TEST(AttentionFeatures, DecodesOneQuery) {
    check_case({}, available_isas());
    check_case({.peaky = true}, available_isas());
}

TEST(AttentionFeatures, ReadsAPrompt) {
    check_case({.rows = 300, .queries = 200}, available_isas());
    check_case({.kv_heads = 1, .group = 7, .rows = 130, .queries = 33, .peaky = true}, available_isas());
}

TEST(AttentionFeatures, HidesWhatTheMaskHides) {
    for (const Mask mask : {Mask::none, Mask::holes, Mask::all_hidden, Mask::padded, Mask::biased}) {
        check_case({.rows = 333, .queries = 1, .mask = mask}, available_isas());
        check_case({.rows = 333, .queries = 12, .mask = mask}, available_isas());
    }
}

TEST(AttentionFeatures, NoRowsGiveZeros) {
    Fixture setup({.rows = 64});
    for (Isa isa : available_isas()) {
        std::vector<float> out;
        AttentionCall call = setup.call(out);
        call.n_rows = 0;
        call.mask = nullptr;
        AttentionWorkspace workspace;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        for (int64_t h = 0; h < setup.n_heads(); ++h) {
            for (int c = 0; c < setup.out_size(); ++c) {
                ASSERT_EQ(out[static_cast<size_t>(h * call.out_head_stride + c)], 0.0f);
            }
        }
    }
}

TEST(AttentionFeatures, SoftCap) {
    check_case({.softcap = 2, .peaky = true}, available_isas());
    check_case({.queries = 5, .softcap = 30, .mu = true, .key_window = 16}, available_isas());
}

TEST(AttentionFeatures, Alibi) {
    check_case({.kv_heads = 2, .group = 4, .rows = 200, .max_bias = 8}, available_isas());
    check_case({.kv_heads = 3, .group = 4, .rows = 200, .queries = 3, .max_bias = 8},
               available_isas()); // 12 heads: two ladders
}

TEST(AttentionFeatures, SinkLogits) {
    check_case({.sinks = true}, available_isas());
    check_case({.queries = 4, .mask = Mask::holes, .sinks = true, .mu = true}, available_isas());
    check_case({.mask = Mask::all_hidden, .sinks = true}, available_isas());
}

TEST(AttentionFeatures, Conditioning) {
    check_case({.mu = true}, available_isas());
    check_case({.lambda = true}, available_isas());
    for (const int head_size : {64, 80, 128, 256}) {
        for (const int bits : {3, 4, 6, 8}) {
            check_case({.head_size = head_size,
                        .group = 3,
                        .key_bits = bits,
                        .rows = 200,
                        .mu = true,
                        .turning = true,
                        .lambda = true},
                       available_isas());
        }
    }
    check_case({.rows = 300,
                .queries = 9,
                .mask = Mask::holes,
                .sinks = true,
                .mu = true,
                .turning = true,
                .lambda = true,
                .key_window = 20,
                .value_window = 30,
                .pins = 2,
                .staging = true},
               available_isas());
    check_case({.rows = 150, .queries = 5, .softcap = 30, .mu = true, .turning = true, .key_window = 16, .workers = 3},
               available_isas());
    check_case({.kv_heads = 1, .group = 5, .rows = 2000, .mu = true, .turning = true, .workers = 2}, available_isas(),
               false);
    check_case({.head_size = 576,
                .value_size = 512,
                .kv_heads = 1,
                .group = 4,
                .rows = 100,
                .mu = true,
                .turning = true,
                .lambda = true},
               available_isas());
    check_case({.head_size = 128,
                .value_size = 72,
                .kv_heads = 2,
                .group = 3,
                .rows = 100,
                .queries = 3,
                .mu = true,
                .turning = true,
                .lambda = true,
                .key_window = 8},
               available_isas());
    check_case({.queries = 9, .mu = true, .lambda = true, .key_window = 20, .value_window = 30}, available_isas());
    // More blocks of positions than a byte tells apart.
    check_case({.rows = 600, .queries = 2, .mu = true, .turning = true, .stride = 130}, available_isas());
}

TEST(AttentionFeatures, ExactRowsOfTheStore) {
    check_case({.key_window = 40}, available_isas());
    check_case({.value_window = 40}, available_isas());
    check_case({.key_window = 10, .value_window = 90, .pins = 4}, available_isas());
    check_case(
        {.rows = 70, .queries = 7, .mu = true, .lambda = true, .key_window = 100, .value_window = 100, .pins = 2},
        available_isas());
}

TEST(AttentionFeatures, ExactRowsOfEachQueryThroughStaging) {
    for (const bool overwrite : {false, true}) {
        check_case({.rows = 200,
                    .queries = 100,
                    .key_window = 32,
                    .value_window = 32,
                    .pins = 4,
                    .staging = true,
                    .overwrite = overwrite},
                   available_isas());
        check_case({.rows = 150,
                    .queries = 40,
                    .mask = Mask::none,
                    .mu = true,
                    .key_window = 16,
                    .value_window = 64,
                    .staging = true,
                    .overwrite = overwrite},
                   available_isas());
        check_case(
            {.rows = 150, .queries = 40, .mask = Mask::biased, .pins = 3, .staging = true, .overwrite = overwrite},
            available_isas());
        check_case(
            {.rows = 150, .queries = 5, .key_window = 64, .staging = true, .overwrite = overwrite, .peaky = true},
            available_isas());
    }
}

TEST(AttentionFeatures, MultiLatentAttention) {
    check_case({.head_size = 576, .value_size = 512, .kv_heads = 1, .group = 16, .rows = 100}, available_isas());
    check_case({.head_size = 576,
                .value_size = 512,
                .kv_heads = 1,
                .group = 4,
                .key_bits = 8,
                .rows = 100,
                .queries = 7,
                .mu = true,
                .lambda = true,
                .key_window = 12,
                .pins = 2,
                .staging = true},
               available_isas());
    check_case({.head_size = 128, .value_size = 72, .kv_heads = 2, .group = 3, .rows = 100, .mu = true, .lambda = true},
               available_isas()); // ends within a rotation block, and the keys have integer kernels
    check_case({.head_size = 576, .value_size = 512, .kv_heads = 1, .group = 4, .key_bits = 16, .rows = 100},
               available_isas());
}

TEST(AttentionFeatures, PassThroughRows) {
    for (const int bits : {16, 32}) {
        check_case({.head_size = 80, .key_bits = bits, .value_bits = bits, .rows = 200, .queries = 3},
                   available_isas());
        check_case({.head_size = 36, .key_bits = bits, .value_bits = 4, .queries = 2}, available_isas());
        check_case({.head_size = 36, .key_bits = 4, .value_bits = bits, .queries = 2, .key_window = 10},
                   available_isas());
    }
}

TEST(AttentionFeatures, KeysAndValuesOfDifferentHeadSize) {
    check_case({.head_size = 192, .value_head_size = 128, .queries = 2}, available_isas());
    check_case({.head_size = 64, .value_head_size = 20, .queries = 2, .value_window = 8}, available_isas());
}

// A tile whose probabilities cannot matter may be left out, but thousands of small ones must not add up to an error.
TEST(AttentionFeatures, ManySmallProbabilitiesAddUp) {
    constexpr int64_t kRows = 64 * 600;
    constexpr int kSize = 64;
    std::unique_ptr<Store> k;
    std::unique_ptr<Store> v;
    ASSERT_TRUE(Store::create({Side::key, kSize, 1, kRows}, {8, 0, 0}, {}, k).ok());
    ASSERT_TRUE(Store::create({Side::value, kSize, 1, kRows}, {8, 0, 0}, {}, v).ok());
    std::vector<float> keys(static_cast<size_t>(kRows * kSize));
    std::vector<float> values(keys.size());
    std::vector<int64_t> index;
    for (int64_t r = 0; r < kRows; ++r) {
        keys[static_cast<size_t>(r * kSize)] = r == 0 ? 18.0f : 0.0f; // a tile of others holds 1e-6, all of them 6e-4
        values[static_cast<size_t>(r * kSize + (r == 0 ? 1 : 2))] = 1;
        index.push_back(r);
    }
    ASSERT_TRUE(k->write(keys.data(), kSize, index.data(), kRows, {}, nullptr).ok());
    ASSERT_TRUE(v->write(values.data(), kSize, index.data(), kRows, {}, nullptr).ok());
    std::vector<float> q(kSize);
    q[0] = 1;
    for (Isa isa : available_isas()) {
        std::vector<float> out(kSize);
        AttentionCall call;
        call.q = q.data();
        call.q_query_stride = call.q_head_stride = call.out_query_stride = call.out_head_stride = kSize;
        call.n_queries = 1;
        call.n_heads = 1;
        call.n_rows = kRows;
        call.out = out.data();
        AttentionWorkspace workspace;
        ASSERT_TRUE(attend(*k, *v, call, workspace, {}, isa).ok());
        const double others = (kRows - 1) * std::exp(-18.0);
        EXPECT_NEAR(out[1], 1 / (1 + others), 1e-4) << isa_name(isa);
        EXPECT_NEAR(out[2], others / (1 + others), 3e-5) << isa_name(isa);
    }
}

TEST(AttentionFeatures, ThreadsChangeRoundingOnly) {
    for (const Case& base : {Case{.kv_heads = 1, .group = 3, .rows = 2000, .mu = true, .value_window = 16},
                             Case{.kv_heads = 2, .group = 4, .rows = 777, .queries = 70, .sinks = true},
                             Case{.kv_heads = 1,
                             .group = 4,
                             .rows = 1500,
                             .queries = 70,
                             .value_window = 30,
                             .pins = 2,
                             .staging = true}, // several chunks of queries, each in several parts
                             Case{.kv_heads = 3, .group = 1, .rows = 1500, .mask = Mask::holes}}) {
        for (const int workers : {2, 3, 8}) {
            Case c = base;
            c.workers = workers;
            check_case(c, available_isas(), false);
        }
    }
}

TEST(AttentionFeatures, SameInputsSameBits) {
    for (const int workers : {1, 3}) {
        Fixture setup({.kv_heads = 2, .group = 3, .rows = 1500, .mask = Mask::biased});
        Threads threads(workers);
        AttentionWorkspace workspace;
        std::vector<float> first;
        std::vector<float> again;
        const Isa isa = available_isas().back();
        ASSERT_TRUE(attend(setup.k(), setup.v(), setup.call(first), workspace, threads.parallel(), isa).ok());
        ASSERT_TRUE(attend(setup.k(), setup.v(), setup.call(again), workspace, threads.parallel(), isa).ok());
        EXPECT_EQ(first, again);
    }
}

TEST(AttentionFeatures, OneWorkspaceServesCallsOfAllShapes) {
    AttentionWorkspace workspace;
    for (const Case& c :
         {Case{.head_size = 128, .group = 8, .rows = 300, .queries = 40}, Case{.head_size = 64, .key_bits = 3},
          Case{.head_size = 80, .key_bits = 8, .value_bits = 2, .rows = 500, .key_window = 20},
          Case{.head_size = 128, .group = 8, .rows = 300, .queries = 40, .value_window = 9}}) {
        Fixture setup(c);
        std::vector<float> out;
        for (Isa isa : available_isas()) {
            ASSERT_TRUE(attend(setup.k(), setup.v(), setup.call(out), workspace, {}, isa).ok());
            EXPECT_LT(setup.worst_error(out, setup.oracle()), kIntTolerance);
        }
    }
}

TEST(AttentionFeatures, StagingOfAnotherStoreOrOfAnOlderWriteCountsAsNone) {
    const Case c{.rows = 100, .queries = 3, .key_window = 8, .staging = true};
    Fixture setup(c);
    Fixture other({.rows = 100, .queries = 3, .key_window = 8, .seed = 2});
    AttentionWorkspace workspace;
    std::vector<float> plain;
    std::vector<float> strange;
    std::vector<float> mine;
    const Isa isa = available_isas().back();
    AttentionCall call = other.call(plain);
    ASSERT_TRUE(attend(other.k(), other.v(), call, workspace, {}, isa).ok());
    call = other.call(strange);
    call.k_staging = setup.call(mine).k_staging;
    ASSERT_TRUE(attend(other.k(), other.v(), call, workspace, {}, isa).ok());
    EXPECT_EQ(plain, strange);

    // Written to since, without staging: the batch's rows may hold other values now.
    const std::vector<float> x(static_cast<size_t>(setup.k().shape().row_elements()), 0.5f);
    for (const int64_t row : {int64_t{98}, int64_t{10}, int64_t{11}, int64_t{12}, int64_t{13}, int64_t{14}, int64_t{15},
                              int64_t{16}, int64_t{17}}) {
        ASSERT_TRUE(setup.k().write(x.data(), 0, &row, 1, {}, nullptr).ok());
    }
    call = setup.call(mine);
    ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
    std::vector<float> without;
    call = setup.call(without);
    call.k_staging = nullptr;
    ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
    EXPECT_EQ(mine, without);
}

// A query that is not finite gets NaN, never zeros or a number, and spoils no other.
TEST(AttentionFeatures, QueriesThatAreNotFinite) {
    for (const int bits : {4, 16}) {
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            Fixture setup({.key_bits = bits, .value_bits = bits, .rows = 100, .queries = 2});
            const auto want = setup.oracle();
            for (Isa isa : available_isas()) {
                std::vector<float> out;
                AttentionCall call = setup.call(out);
                std::vector<float> q(call.q, call.q + 2 * call.q_query_stride);
                q[static_cast<size_t>(call.q_head_stride + 5)] = bad; // query 0, head 1
                call.q = q.data();
                AttentionWorkspace workspace;
                ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
                for (int c = 0; c < setup.out_size(); ++c) {
                    float& x = out[static_cast<size_t>(call.out_head_stride + c)];
                    EXPECT_TRUE(std::isnan(x)) << isa_name(isa) << ' ' << bits << ' ' << bad;
                    x = static_cast<float>(want[1].out[static_cast<size_t>(c)]);
                }
                EXPECT_LT(setup.worst_error(out, want), kIntTolerance) << isa_name(isa);
            }
        }
    }
}

// A prompt's queries in two calls: the second says with staging_offset where it begins.
TEST(AttentionFeatures, PartOfABatch) {
    Fixture setup({.rows = 120, .queries = 30, .key_window = 8, .value_window = 12, .staging = true});
    const auto want = setup.oracle();
    for (Isa isa : available_isas()) {
        AttentionWorkspace workspace;
        std::vector<float> out;
        AttentionCall call = setup.call(out);
        call.n_queries = 11;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        call.staging_offset = 11;
        call.q += 11 * call.q_query_stride;
        call.out += 11 * call.out_query_stride;
        call.mask += 11 * call.mask_query_stride;
        call.n_queries = 30 - 11;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        EXPECT_LT(setup.worst_error(out, want), kIntTolerance) << isa_name(isa);
    }
}

// Staging may hold a row's older version, and what a rewritten row was before: neither may be used.
TEST(AttentionFeatures, OnlyTheLatestVersionOfARowCounts) {
    Fixture setup({.rows = 100, .queries = 20, .key_window = 40, .staging = true});
    AttentionWorkspace workspace;
    for (Isa isa : available_isas()) {
        std::vector<float> plain;
        AttentionCall call = setup.call(plain);
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());

        Staging stale = *call.k_staging;
        const size_t n = static_cast<size_t>(setup.k().shape().row_elements());
        const int64_t row = stale.row[static_cast<size_t>(stale.batch_begin)];
        stale.row.insert(stale.row.begin(), row);
        stale.age.insert(stale.age.begin(), stale.age[static_cast<size_t>(stale.batch_begin)] - 1);
        stale.raw.insert(stale.raw.begin(), n, to_half(3.0f));
        ++stale.batch_begin;
        std::vector<float> again;
        call = setup.call(again);
        call.k_staging = &stale;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        EXPECT_EQ(plain, again) << isa_name(isa);
    }
    std::vector<float> x(static_cast<size_t>(setup.k().shape().row_elements()), 0.25f);
    const int64_t rewritten = 99; // the batch's last row: in the ring, and staged with its old values
    ASSERT_TRUE(setup.k().rewrite(rewritten, x.data()).ok());
    for (Isa isa : available_isas()) {
        std::vector<float> staged;
        std::vector<float> stored;
        AttentionCall call = setup.call(staged);
        const int64_t last = call.n_queries - 1; // sees the same exact rows with staging and without
        call.staging_offset = last;
        call.n_queries = 1;
        call.q += last * call.q_query_stride;
        call.mask += last * call.mask_query_stride;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        setup.call(stored);
        call.out = stored.data();
        call.k_staging = nullptr;
        call.v_staging = nullptr;
        ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
        EXPECT_EQ(staged, stored) << isa_name(isa);
    }
}

TEST(AttentionErrors, NameTheShapes) {
    Fixture setup({.kv_heads = 2, .rows = 64});
    AttentionWorkspace workspace;
    std::vector<float> out;
    const auto message = [&](auto change, const Store* k = nullptr, const Store* v = nullptr) {
        AttentionCall call = setup.call(out);
        change(call);
        const Store& keys = k != nullptr ? *k : setup.k();
        const Store& values = v != nullptr ? *v : setup.v();
        const Status s = attend(keys, values, call, workspace, {}, Isa::portable);
        EXPECT_EQ(s.code(), StatusCode::invalid_argument);
        EXPECT_FALSE(attend_reference(keys, values, call).ok());
        return s.message();
    };
    const auto nothing = [](AttentionCall&) {};
    EXPECT_NE(message([](AttentionCall& c) { c.n_heads = 3; }).find("3 query heads over 2 KV heads"),
              std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.n_heads = 0; }).find("0 query heads"), std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.n_rows = 135; }).find("135 rows asked of a store of 134"),
              std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.n_rows = -1; }).find("-1 rows"), std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.value_size = 65; }).find("value_size 65"), std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.q = nullptr; }).find("q null"), std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.out = nullptr; }).find("out null"), std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.n_queries = -1; }).find("-1 queries"), std::string::npos);
    EXPECT_NE(message([](AttentionCall& c) { c.scale = std::nanf(""); }).find("finite"), std::string::npos);
    EXPECT_NE(message(nothing, &setup.v()).find("key store first"), std::string::npos);
    EXPECT_NE(message(nothing, nullptr, &setup.k()).find("value_size"), std::string::npos);
    std::unique_ptr<Store> narrow;
    ASSERT_TRUE(Store::create({Side::value, 64, 1, 134}, {4, 0, 0}, {}, narrow).ok());
    EXPECT_NE(message(nothing, nullptr, narrow.get()).find("134 rows x 1 heads x 64"), std::string::npos);
}

TEST(AttentionErrors, QueriesOutsideTheStagedBatch) {
    Fixture setup({.rows = 64, .queries = 4, .key_window = 8, .staging = true});
    AttentionWorkspace workspace;
    std::vector<float> out;
    for (const int64_t offset : {int64_t{-1}, int64_t{1}}) {
        AttentionCall call = setup.call(out);
        call.staging_offset = offset;
        const Status s = attend(setup.k(), setup.v(), call, workspace, {}, Isa::portable);
        EXPECT_EQ(s.code(), StatusCode::invalid_argument);
        EXPECT_NE(s.message().find("batch of 4 rows"), std::string::npos) << s.message();
    }
}

TEST(AttentionErrors, InstructionSetsThatAreNotHere) {
    Fixture setup({.rows = 64});
    AttentionWorkspace workspace;
    std::vector<float> out;
    for (const Isa isa : {Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::avx512vbmi, Isa::neon}) {
        const auto& here = available_isas();
        if (std::find(here.begin(), here.end(), isa) == here.end()) {
            EXPECT_EQ(attend(setup.k(), setup.v(), setup.call(out), workspace, {}, isa).code(),
                      StatusCode::unsupported);
        }
    }
}

} // namespace
} // namespace turboquant::attention_tests
