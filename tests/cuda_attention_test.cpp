// Attention on the GPU against attention in double precision over the decoded rows.
#include "cuda_attention_fixture.h"

namespace turboquant::cuda_tests {
namespace {

TEST(CudaAttention, OneSequence) {
    TQ_NEED_GPU();
    for (const int length : {1, 2, 15, 16, 17, 63, 64, 65, 200, 1000, 5000}) {
        AttentionCase c;
        c.lengths = {length};
        check(c);
    }
}

TEST(CudaAttention, AllBitsAndHeadSizes) {
    TQ_NEED_GPU();
    uint32_t seed = 1;
    for (const int head_size : {64, 128, 256}) {
        for (const int key_bits : {2, 3, 4, 8}) {
            for (const int value_bits : {2, 3, 4, 8}) {
                for (const int group : {4, 8}) {
                    AttentionCase c;
                    c.shape.head_size = head_size;
                    c.shape.key_bits = key_bits;
                    c.shape.value_bits = value_bits;
                    c.group = group;
                    c.lengths = {777, 64, 130};
                    c.seed = seed++;
                    check(c);
                }
            }
        }
    }
}

TEST(CudaAttention, GroupsAndQueryLengths) {
    TQ_NEED_GPU();
    for (const int group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}) {
        for (const int q_len : {1, 2, 3, 5, 8, 16}) {
            AttentionCase c;
            c.group = group;
            c.q_len = q_len;
            c.lengths = {300, 17, 64};
            c.seed = static_cast<uint32_t>(group * 100 + q_len);
            c.not_causal = q_len == 3;
            check(c);
        }
    }
}

TEST(CudaAttention, LengthsAndPageSizes) {
    TQ_NEED_GPU();
    for (const int page_size : {16, 32, 64, 128, 256}) {
        AttentionCase c;
        c.shape.page_size = page_size;
        c.lengths = {1, 0, 500, 3, 64, 65, 2000, 16, 0, 129, 31};
        check(c);
        c.lengths.assign(100, 70); // more items than blocks
        check(c);
        c.lengths = {0};
        check(c);
        c.lengths = {3000, 5};
        c.n_blocks = 7;
        check(c);
        c.n_blocks = 1;
        check(c);
    }
}

TEST(CudaAttention, SoftcapSlidingWindowSinkLogits) {
    TQ_NEED_GPU();
    for (const int q_len : {1, 4, 16}) {
        for (const int sliding : {0, 1, 50, 64, 200, 5000}) {
            AttentionCase c;
            c.q_len = q_len;
            c.lengths = {700, 40, 129};
            c.sliding_window = sliding;
            check(c);
            c.softcap = 20;
            check(c);
            c.sink_logits = true;
            c.softcap = 0;
            check(c);
        }
    }
}

TEST(CudaAttention, ConditionedKeys) {
    TQ_NEED_GPU();
    for (const int head_size : {64, 128, 256}) {
        for (const bool sink_logits : {false, true}) {
            AttentionCase c;
            c.shape.head_size = head_size;
            c.conditioned = true;
            c.sink_logits = sink_logits;
            c.lengths = {500, 90};
            check(c, 5e-4);
            c.softcap = 15;
            check(c, 5e-4);
        }
    }
}

TEST(CudaAttention, AMeanForEvery256Positions) {
    TQ_NEED_GPU();
    for (const int q_len : {1, 4, 16}) {
        AttentionCase c;
        c.q_len = q_len;
        c.lengths = {900, 250, 257, 600};
        check_means_by_position(c);
    }
}

TEST(CudaAttention, ExactRows) { // kept as fp16 in the rotated basis: that rounding is in the bound
    TQ_NEED_GPU();
    for (const int q_len : {1, 3, 16}) {
        for (const auto& [sinks, window] : {std::pair{4, 0}, {0, 32}, {4, 32}, {4, 128}, {70, 5}}) {
            for (const int sliding : {0, 100}) {
                AttentionCase c;
                c.q_len = q_len;
                c.sinks = sinks;
                c.window = window;
                c.sliding_window = sliding;
                c.lengths = {600, 16, 36, 150, 64};
                c.conditioned = sliding > 0;
                check(c, 1e-3);
            }
        }
    }
}

TEST(CudaAttention, LargeScores) {
    TQ_NEED_GPU();
    AttentionCase c;
    c.peaky = true;
    c.lengths = {4000, 50};
    check(c, 1e-3);
}

TEST(CudaAttention, HalfAndBfloat) {
    TQ_NEED_GPU();
    AttentionCase c;
    c.lengths = {900, 33};
    c.type = TQ_CUDA_F16;
    check(c, 6e-4); // the output's own rounding
    c.type = TQ_CUDA_BF16;
    check(c, 4e-3);
}

TEST(CudaAttention, ManyRandomShapes) {
    TQ_NEED_GPU();
    std::mt19937 random(99);
    const auto pick = [&random](std::initializer_list<int> from) { return *(from.begin() + random() % from.size()); };
    for (uint32_t seed = 0; seed < 60; ++seed) {
        AttentionCase c;
        c.seed = seed;
        c.shape.head_size = pick({64, 128, 256});
        c.shape.kv_heads = pick({1, 2, 3, 8});
        c.shape.key_bits = pick({2, 3, 4, 8});
        c.shape.value_bits = pick({2, 3, 4, 8});
        c.shape.page_size = pick({16, 32, 64, 128, 256});
        c.group = pick({1, 2, 3, 4, 7, 8, 16});
        c.q_len = pick({1, 1, 2, 4, 7, 16});
        c.lengths.clear();
        for (int b = pick({1, 2, 5, 9}); b > 0; --b) {
            c.lengths.push_back(static_cast<int32_t>(random() % 700));
        }
        c.softcap = static_cast<float>(pick({0, 0, 30}));
        c.sliding_window = pick({0, 0, 128});
        c.sink_logits = pick({0, 1}) != 0;
        c.conditioned = pick({0, 1}) != 0;
        if (pick({0, 1}) != 0) {
            c.sinks = 4;
            c.window = 32;
        }
        check(c, 1e-3);
    }
}

TEST(CudaAttention, InAGraph) {
    TQ_NEED_GPU();
    check_in_a_graph(1, false);
}

TEST(CudaAttention, RefusesInWords) {
    CacheShape shape;
    tq_cuda_cache cache = make_cache(shape);
    uint64_t memory[2] = {};
    cache.pages = memory;
    tq_cuda_attention a{};
    a.struct_size = sizeof a;
    a.batch = 1;
    a.q_len = 17;
    a.heads = 8;
    EXPECT_EQ(tq_cuda_attend(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_attend: q_len 17 is not in 1..16");
    a.q_len = 1;
    a.heads = 7;
    EXPECT_EQ(tq_cuda_attend(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_attend: heads 7 is not 1 to 16 times kv_heads 2");
    a.struct_size = 3;
    EXPECT_EQ(tq_cuda_attend(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    TQ_NEED_GPU();
    a.struct_size = sizeof a;
    a.heads = 8;
    EXPECT_EQ(tq_cuda_attend(&cache, &a, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_attend: q, out, page_table or lengths is null");
}

} // namespace
} // namespace turboquant::cuda_tests
