// Prefill attention on the GPU against attention in double precision over the decoded rows.
#include "cuda_attention_fixture.h"

namespace turboquant::cuda_tests {
namespace {

constexpr double kBound = 6e-4; // operands are fp16

AttentionCase prefill_case(int q_len, std::vector<int32_t> lengths) {
    AttentionCase c;
    c.prefill = true;
    c.q_len = q_len;
    c.lengths = std::move(lengths);
    c.group = 2;
    return c;
}

TEST(CudaPrefill, Lengths) {
    TQ_NEED_GPU();
    for (const int q_len : {1, 17, 63, 64, 65, 130, 300}) {
        AttentionCase c = prefill_case(q_len, {300, 64, 129, 1, 0, 257});
        c.seed = static_cast<uint32_t>(q_len);
        check(c, kBound);
        c.not_causal = true;
        check(c, kBound);
    }
}

TEST(CudaPrefill, AllBitsAndHeadSizes) {
    TQ_NEED_GPU();
    uint32_t seed = 1;
    for (const int head_size : {64, 128, 256}) {
        for (const int key_bits : {2, 3, 4, 8}) {
            for (const int value_bits : {2, 3, 4, 8}) {
                AttentionCase c = prefill_case(70, {270, 95});
                c.shape.head_size = head_size;
                c.shape.key_bits = key_bits;
                c.shape.value_bits = value_bits;
                c.seed = seed++;
                check(c, kBound);
            }
        }
    }
}

TEST(CudaPrefill, GroupsAndPageSizes) {
    TQ_NEED_GPU();
    for (const int group : {1, 2, 3, 4, 5, 7, 8, 12, 16}) {
        for (const int page_size : {16, 32, 64, 128, 256}) {
            AttentionCase c = prefill_case(45, {200, 33});
            c.shape.page_size = page_size;
            c.group = group;
            c.seed = static_cast<uint32_t>(group * 1000 + page_size);
            check(c, kBound);
        }
    }
}

TEST(CudaPrefill, SoftcapSlidingWindowSinkLogits) {
    TQ_NEED_GPU();
    for (const int sliding : {0, 1, 50, 64, 200, 5000}) {
        AttentionCase c = prefill_case(150, {700, 40, 129});
        c.sliding_window = sliding;
        check(c, kBound);
        c.softcap = 20;
        check(c, kBound);
        c.sink_logits = true;
        c.softcap = 0;
        check(c, kBound);
    }
}

TEST(CudaPrefill, ConditionedKeys) {
    TQ_NEED_GPU();
    for (const int head_size : {64, 128, 256}) {
        for (const bool sink_logits : {false, true}) {
            AttentionCase c = prefill_case(100, {400, 90});
            c.shape.head_size = head_size;
            c.conditioned = true;
            c.sink_logits = sink_logits;
            check(c, kBound);
            c.softcap = 15;
            check(c, kBound);
        }
    }
}

TEST(CudaPrefill, AMeanForEvery256Positions) {
    TQ_NEED_GPU();
    for (const int q_len : {20, 150}) {
        check_means_by_position(prefill_case(q_len, {900, 250, 257, 600}));
    }
}

TEST(CudaPrefill, ExactRows) { // kept as fp16 in the rotated basis: that rounding is in the bound
    TQ_NEED_GPU();
    for (const int head_size : {64, 128, 256}) {
        for (const auto& [sinks, window, ring] : {std::tuple{4, 0, 0},
                                                  {0, 32, 0},
                                                  {4, 32, 0},
                                                  {4, 128, 0},
                                                  {70, 5, 0},
                                                  {0, 32, 32},
                                                  {4, 128, 150}}) { // a ring that holds less than asked for
            for (const int sliding : {0, 100}) {
                AttentionCase c = prefill_case(head_size == 128 ? 200 : 90, {500, 16, 36, 150, 64});
                c.shape.head_size = head_size;
                c.sinks = sinks;
                c.window = window;
                c.ring = ring;
                c.sliding_window = sliding;
                c.conditioned = sliding > 0;
                c.softcap = sinks == 70 ? 10 : 0;
                check(c, 1e-3);
            }
        }
    }
}

TEST(CudaPrefill, LargeScores) {
    TQ_NEED_GPU();
    AttentionCase c = prefill_case(60, {2000, 50});
    c.peaky = true;
    check(c, 1.5e-3);
}

TEST(CudaPrefill, InAGraph) {
    TQ_NEED_GPU();
    check_in_a_graph(8, true);   // tokens split between blocks
    check_in_a_graph(700, true); // one block a tile of queries
}

TEST(CudaPrefill, TypesAndAlignment) {
    TQ_NEED_GPU();
    for (const bool unaligned : {false, true}) {
        for (const auto& [type, bound] : {std::pair{TQ_CUDA_F32, kBound}, {TQ_CUDA_F16, 8e-4}, {TQ_CUDA_BF16, 4e-3}}) {
            AttentionCase c = prefill_case(140, {333, 140});
            c.type = type;
            c.unaligned = unaligned;
            check(c, bound); // the output's own rounding is in it
        }
    }
}

TEST(CudaPrefill, SeveralPassesThroughASmallWorkspace) {
    TQ_NEED_GPU();
    AttentionCase c = prefill_case(130, {300, 200, 130});
    c.shape.kv_heads = 3;
    c.small = true;
    c.sinks = 4;
    c.window = 20;
    check(c, 1e-3);
    c.conditioned = true;
    c.mu_blocks = 2;
    check(c, 1e-3);
}

TEST(CudaPrefill, ManyRandomShapes) {
    TQ_NEED_GPU();
    std::mt19937 random(77);
    const auto pick = [&random](std::initializer_list<int> from) { return *(from.begin() + random() % from.size()); };
    for (uint32_t seed = 0; seed < 40; ++seed) {
        AttentionCase c = prefill_case(pick({1, 16, 40, 128, 200}), {});
        c.seed = seed;
        c.shape.head_size = pick({64, 128, 256});
        c.shape.kv_heads = pick({1, 2, 3});
        c.shape.key_bits = pick({2, 3, 4, 8});
        c.shape.value_bits = pick({2, 3, 4, 8});
        c.shape.page_size = pick({16, 32, 64, 128, 256});
        c.group = pick({1, 2, 3, 4, 7});
        for (int b = pick({1, 2, 4}); b > 0; --b) {
            c.lengths.push_back(static_cast<int32_t>(random() % 600));
        }
        c.softcap = static_cast<float>(pick({0, 0, 30}));
        c.sliding_window = pick({0, 0, 128});
        c.sink_logits = pick({0, 1}) != 0;
        c.conditioned = pick({0, 1}) != 0;
        c.not_causal = pick({0, 0, 0, 1}) != 0;
        c.small = pick({0, 1}) != 0;
        if (pick({0, 1}) != 0) {
            c.sinks = pick({0, 4, 200});
            c.window = pick({1, 32});
            c.ring = pick({0, 40});
        }
        check(c, 1e-3);
    }
}

TEST(CudaPrefill, TokensSplitBetweenBlocks) {
    TQ_NEED_GPU();
    for (const int n_blocks : {1, 8, 20, 100, 1000}) {
        AttentionCase c = prefill_case(50, {4500, 70, 2100, 3});
        c.n_blocks = n_blocks;
        c.type = TQ_CUDA_F16;
        check(c, 8e-4);
        c.sink_logits = true;
        c.sinks = 4;
        c.window = 30;
        c.conditioned = true;
        c.mu_blocks = n_blocks % 3;
        c.small = n_blocks == 100;
        c.unaligned = n_blocks == 20;
        check(c, 1e-3);
        c.softcap = 20;
        c.sliding_window = 1000; // most parts see nothing
        check(c, 1e-3);
    }
}

TEST(CudaPrefill, ALongerSequenceThanAllowedGivesNotANumber) {
    TQ_NEED_GPU();
    AttentionCase c = prefill_case(20, {300});
    c.max_length = 299;
    Fixture fixture(c);
    EXPECT_TRUE(std::isinf(fixture.error())); // what the fixture makes of NaN
}

TEST(CudaPrefill, RefusesInWords) {
    CacheShape shape;
    tq_cuda_cache cache = make_cache(shape);
    alignas(16) uint64_t memory[2] = {};
    cache.pages = memory;
    tq_cuda_attention a{};
    a.struct_size = sizeof a;
    a.batch = 1;
    a.heads = 8;
    size_t least = 0;
    size_t all = 0;
    EXPECT_EQ(tq_cuda_prefill_workspace_bytes(&cache, &a, &least, &all), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_prefill_workspace_bytes: q_len 0 is not positive");
    a.q_len = 100;
    EXPECT_EQ(tq_cuda_prefill(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_prefill: max_length 0 is not in 1..2^30");
    a.max_length = 1000;
    a.n_blocks = 1;
    EXPECT_EQ(tq_cuda_prefill_workspace_bytes(&cache, &a, &least, &all), TQ_OK);
    EXPECT_EQ(least, 1024U * 128 * 2 * 2); // whole tiles of 128 tokens, keys and values in fp16
    EXPECT_EQ(all, least * 2);
    EXPECT_EQ(tq_cuda_prefill(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_prefill: q, out, page_table or lengths is null");
    int32_t some = 0;
    a.q = a.out = &some;
    a.page_table = a.lengths = &some;
    EXPECT_EQ(tq_cuda_prefill(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(tq_cuda_last_error()).find("tq_cuda_prefill: the workspace is null"), 0U);
    a.heads = 7;
    EXPECT_EQ(tq_cuda_prefill(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_prefill: heads 7 is not 1 to 16 times kv_heads 2");
}

} // namespace
} // namespace turboquant::cuda_tests
