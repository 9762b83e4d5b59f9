// What the plug-in reads off a graph about RoPE, compared with what the host's CPU back end does to keys.
#include "ggml/rope.h"

#include "ggml-backend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>

namespace turboquant::plugin {
namespace {

constexpr int kHeads = 2;
constexpr int kTokens = 3;

struct Scaling {
    int n_dims = 64;
    int mode = GGML_ROPE_TYPE_NORMAL;
    float base = 10000;
    float frequency = 1;
    float extrapolation = 0; // > 0: YaRN
    int sections[4] = {0, 0, 0, 0};
};

class Rope : public testing::Test {
protected:
    void SetUp() override {
        ctx = ggml_init({16 << 20, nullptr, false});
        ggml_backend_load_all(); // hosts in several libraries
        ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        ASSERT_NE(device, nullptr);
        cpu = ggml_backend_dev_init(device, nullptr);
        ASSERT_NE(cpu, nullptr);
        buffer = ggml_backend_cpu_buffer_from_ptr(ggml_get_mem_buffer(ctx), ggml_get_mem_size(ctx));
    }
    void TearDown() override {
        ggml_backend_buffer_free(buffer);
        ggml_backend_free(cpu);
        ggml_free(ctx);
    }
    ggml_tensor* keys(int channels, int heads = kHeads) {
        ggml_tensor* weights = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, channels * heads);
        ggml_tensor* x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, kTokens);
        return ggml_reshape_3d(ctx, ggml_mul_mat(ctx, weights, x), channels, heads, kTokens);
    }
    ggml_tensor* rope(ggml_tensor* x, const Scaling& s, ggml_tensor* factors = nullptr) {
        const bool sections = (s.mode & GGML_ROPE_TYPE_MROPE) != 0;
        ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, x->ne[2] * (sections ? 4 : 1));
        int parts[4];
        std::memcpy(parts, s.sections, sizeof parts);
        return sections ? ggml_rope_multi(ctx, x, positions, factors, s.n_dims, parts, s.mode, 4096, s.base,
                                          s.frequency, s.extrapolation, 1, 32, 1)
                        : ggml_rope_ext(ctx, x, positions, factors, s.n_dims, s.mode, 4096, s.base, s.frequency,
                                        s.extrapolation, 1, 32, 1);
    }
    // As a host writes keys: heads merged, then SET_ROWS.
    ggml_tensor* written(ggml_tensor* k) {
        const int64_t elements = k->ne[0] * k->ne[1];
        ggml_tensor* cache = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, elements, 16);
        ggml_tensor* index = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, kTokens);
        return ggml_set_rows(ctx, cache, ggml_view_2d(ctx, k, elements, kTokens, k->nb[2], 0), index);
    }
    std::vector<RopePair> pairs_of(ggml_tensor* k, RopeTrace::Kind kind = RopeTrace::Kind::turns) {
        RopeTrace trace;
        trace_rope(written(k), static_cast<int>(k->ne[0]), trace);
        EXPECT_EQ(static_cast<int>(trace.kind), static_cast<int>(kind));
        std::vector<RopePair> pairs;
        const Status status = rope_pairs(trace, cpu, pairs);
        EXPECT_TRUE(status.ok()) << status.message();
        return pairs;
    }
    // The host's ROPE on a random head at a far position against the pairs' turns of it.
    void expect_same_turn(const Scaling& s, const std::vector<RopePair>& pairs, int channels,
                          ggml_tensor* factors = nullptr) {
        constexpr int kPosition = 3001;
        ggml_tensor* x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, channels, 1, 1);
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        auto* in = static_cast<float*>(x->data);
        for (int i = 0; i < channels; ++i) {
            in[i] = normal(random);
        }
        ggml_tensor* turned = rope(x, s, factors);
        std::fill_n(static_cast<int32_t*>(turned->src[1]->data), turned->src[1]->ne[0], kPosition);
        ggml_cgraph* graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, turned);
        ASSERT_EQ(ggml_backend_graph_compute(cpu, graph), GGML_STATUS_SUCCESS);
        const auto* out = static_cast<const float*>(turned->data);
        // YaRN also scales the rotated part, which is no turn: compare directions.
        std::vector<bool> paired(static_cast<size_t>(channels));
        for (const RopePair& pair : pairs) {
            paired[pair.first] = paired[pair.second] = true;
            const double angle = static_cast<double>(pair.theta) * kPosition;
            const double re = in[pair.first] * std::cos(angle) - in[pair.second] * std::sin(angle);
            const double im = in[pair.first] * std::sin(angle) + in[pair.second] * std::cos(angle);
            const double scale = std::hypot(out[pair.first], out[pair.second]) / std::hypot(re, im);
            // Angles come from fp32 cosines: 1e-7 of a radian, times the position.
            EXPECT_NEAR(out[pair.first], scale * re, 3e-3) << pair.first;
            EXPECT_NEAR(out[pair.second], scale * im, 3e-3) << pair.second;
        }
        for (int i = 0; i < channels; ++i) {
            if (!paired[static_cast<size_t>(i)]) {
                EXPECT_NEAR(out[i], in[i], 1e-6) << i;
            }
        }
    }
    ggml_context* ctx = nullptr;
    ggml_backend_t cpu = nullptr;
    ggml_backend_buffer_t buffer = nullptr; // of the context's memory: what a host's weights and inputs lie in
};

TEST_F(Rope, NeighbouringChannelsWithKnownThetas) {
    const std::vector<RopePair> pairs = pairs_of(rope(keys(64), {}));
    ASSERT_EQ(pairs.size(), 32U);
    for (size_t i = 0; i < pairs.size(); ++i) {
        EXPECT_EQ(pairs[i].first, 2 * i);
        EXPECT_EQ(pairs[i].second, 2 * i + 1);
        const double theta = std::pow(10000.0, -2.0 * static_cast<double>(i) / 64);
        EXPECT_NEAR(pairs[i].theta, theta, 1e-6 * theta + 1e-7);
    }
}

TEST_F(Rope, HalvesAndPartOfTheChannels) {
    const Scaling s = {.n_dims = 32, .mode = GGML_ROPE_TYPE_NEOX, .base = 500000};
    const std::vector<RopePair> pairs = pairs_of(rope(keys(80), s));
    ASSERT_EQ(pairs.size(), 16U);
    EXPECT_EQ(pairs[3].first, 3);
    EXPECT_EQ(pairs[3].second, 19);
    expect_same_turn(s, pairs, 80);
}

TEST_F(Rope, FrequencyFactorsAndAPairThatStandsStill) {
    ggml_tensor* factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 32);
    for (int i = 0; i < 32; ++i) {
        static_cast<float*>(factors->data)[i] = i < 24 ? 1.0F + 0.25F * static_cast<float>(i) : 1e30F;
    }
    factors->buffer = buffer;
    const std::vector<RopePair> pairs = pairs_of(rope(keys(64), {}, factors));
    EXPECT_EQ(pairs.size(), 24U);
    expect_same_turn({}, pairs, 64, factors);
}

TEST_F(Rope, YarnAndLinearScaling) {
    for (const float extrapolation : {0.0F, 1.0F}) {
        const Scaling s = {
            .n_dims = 128, .mode = GGML_ROPE_TYPE_NEOX, .frequency = 0.25F, .extrapolation = extrapolation};
        const std::vector<RopePair> pairs = pairs_of(rope(keys(128), s));
        EXPECT_EQ(pairs.size(), 64U);
        expect_same_turn(s, pairs, 128);
    }
}

TEST_F(Rope, SeveralPositionsARow) {
    for (const int mode : {GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE}) {
        const Scaling s = {.mode = mode, .base = 1000000, .sections = {8, 12, 12, 0}};
        const std::vector<RopePair> pairs = pairs_of(rope(keys(64), s));
        EXPECT_EQ(pairs.size(), 32U);
        expect_same_turn(s, pairs, 64);
    }
}

TEST_F(Rope, LatentAttentionInEitherOrder) {
    const Scaling s = {.n_dims = 16};
    const std::vector<RopePair> alone = pairs_of(rope(keys(16, 1), s));
    const auto normed = [&] { return ggml_rms_norm(ctx, keys(48, 1), 1e-6F); };
    const std::vector<RopePair> behind = pairs_of(ggml_concat(ctx, normed(), rope(keys(16, 1), s), 0));
    const std::vector<RopePair> before = pairs_of(ggml_concat(ctx, rope(keys(16, 1), s), normed(), 0));
    ASSERT_EQ(behind.size(), 8U);
    EXPECT_TRUE(same_turns(before, alone));
    for (size_t i = 0; i < alone.size(); ++i) {
        EXPECT_EQ(behind[i].first, alone[i].first + 48);
        EXPECT_EQ(behind[i].second, alone[i].second + 48);
        EXPECT_EQ(behind[i].theta, alone[i].theta);
    }
    // One rotated part for all heads.
    ggml_tensor* repeated = ggml_repeat_4d(ctx, rope(keys(16, 1), s), 16, kHeads, kTokens, 1);
    EXPECT_TRUE(same_turns(pairs_of(ggml_concat(ctx, keys(48), repeated, 0)), behind));
}

TEST_F(Rope, WhatStandsBetweenRopeAndCache) {
    const std::vector<RopePair> plain = pairs_of(rope(keys(64), {}));
    EXPECT_TRUE(same_turns(pairs_of(ggml_scale(ctx, rope(keys(64), {}), 0.5F)), plain));
    EXPECT_TRUE(same_turns(pairs_of(ggml_cont(ctx, ggml_rms_norm(ctx, rope(keys(64), {}), 1e-6F))), plain));
    EXPECT_FALSE(same_turns(pairs_of(rope(keys(64), {.base = 10100})), plain));
}

TEST_F(Rope, KeysThatDoNotTurnAndKeysOfUnknownOrigin) {
    EXPECT_TRUE(pairs_of(keys(64), RopeTrace::Kind::still).empty());
    EXPECT_TRUE(
        pairs_of(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 64, kHeads, kTokens), RopeTrace::Kind::unknown).empty());
    // A ROPE of other heads than the cache's says nothing.
    ggml_tensor* other = ggml_reshape_3d(ctx, rope(keys(32, 4), {.n_dims = 32}), 64, kHeads, kTokens);
    EXPECT_TRUE(pairs_of(other, RopeTrace::Kind::unknown).empty());
}

TEST_F(Rope, SignaturesTellGraphsApart) {
    RopeTrace trace; // used again and again, as the plug-in does
    const auto signature_of = [&](ggml_tensor* k) {
        std::vector<int32_t> out;
        trace_rope(written(k), 64, trace);
        trace.signature(out);
        return out;
    };
    const auto signature = [&](const Scaling& s) { return signature_of(rope(keys(64), s)); };
    EXPECT_EQ(signature({}), signature({}));
    EXPECT_NE(signature({}), signature({.base = 20000}));
    EXPECT_NE(signature({}), signature({.mode = GGML_ROPE_TYPE_NEOX}));
    EXPECT_NE(signature({}), signature_of(keys(64)));
}

TEST_F(Rope, PositionsAreTakenOnlyWhenTheyCanBeRight) {
    ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 4 * kTokens);
    auto* p = static_cast<int32_t*>(positions->data);
    for (int i = 0; i < 4 * kTokens; ++i) {
        p[i] = 100 + i;
    }
    positions->buffer = buffer;
    std::vector<int32_t> out;
    EXPECT_TRUE(read_positions(positions, kTokens, out)); // sections: the first ones
    EXPECT_EQ(out, (std::vector<int32_t>{100, 101, 102}));
    EXPECT_FALSE(read_positions(positions, kTokens + 1, out));
    EXPECT_TRUE(out.empty());
    for (const int32_t wrong : {-1, (1 << 24) + 1, static_cast<int32_t>(0x3f800000)}) { // 1.0f: reused memory
        p[1] = wrong;
        EXPECT_FALSE(read_positions(positions, kTokens, out)) << wrong;
    }
    EXPECT_FALSE(read_positions(nullptr, kTokens, out));
}

} // namespace
} // namespace turboquant::plugin
