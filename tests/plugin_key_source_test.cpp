// The source of a layer's conditioning by itself: what no host on this machine shows, such as graphs that hide how keys
// turn, and rows that must not count.
#include "ggml/key_source.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace turboquant::plugin {
namespace {

constexpr int kHead = 64;
constexpr int kHeads = 2;
constexpr int kQueryHeads = 4;

class KeySourceTest : public testing::Test {
protected:
    void SetUp() override {
        facts.known = true;
        facts.kind = RopeTrace::Kind::turns;
        for (uint16_t i = 0; i < kHead / 2; ++i) {
            facts.pairs.push_back({static_cast<uint16_t>(2 * i), static_cast<uint16_t>(2 * i + 1),
                                   std::pow(10000.0F, -2.0F * static_cast<float>(i) / kHead)});
        }
    }
    void make_stores(const KeySource& source, int n = 2) {
        stores.resize(static_cast<size_t>(n));
        for (auto& store : stores) {
            const Status status = Store::create({.head_size = kHead, .kv_heads = kHeads, .rows = 512},
                                                {.bits = 4, .window = 8, .calibration_rows = source.calibration_rows()},
                                                source.initial(), store);
            ASSERT_TRUE(status.ok()) << status.message();
        }
    }
    // A row around an offset, turned to its position.
    void add(KeySource& source, int32_t position, float spread = 1, float spoil = 0) {
        std::vector<float> key(kHead * kHeads);
        std::vector<float> q(kHead * kQueryHeads);
        for (size_t i = 0; i < key.size(); ++i) {
            key[i] = (i % 7 == 0 ? 20.0F : 0.0F) + spread * normal(random);
        }
        for (size_t h = 0; h < kHeads; ++h) {
            for (const RopePair& pair : facts.pairs) {
                float& a = key[h * kHead + pair.first];
                float& b = key[h * kHead + pair.second];
                const float c = std::cos(pair.theta * static_cast<float>(position));
                const float s = std::sin(pair.theta * static_cast<float>(position));
                const float turned = a * c - b * s;
                b = a * s + b * c;
                a = turned;
            }
        }
        for (float& x : q) {
            x = normal(random);
        }
        if (spoil != 0) {
            key[3] = spoil;
        }
        source.add({.key = key.data(),
                    .position = position,
                    .q = q.data(),
                    .q_head_stride = kHead,
                    .n_heads = kQueryHeads,
                    .scale = 0.125F},
                   kHead, kHeads);
    }
    RopeFacts facts;
    Stores stores;
    std::mt19937 random{5};
    std::normal_distribution<float> normal;
};

TEST_F(KeySourceTest, CountsExactly128) {
    KeySource source(nullptr, true);
    EXPECT_EQ(source.calibration_rows(), KeySource::kRing);
    make_stores(source);
    EXPECT_FALSE(source.wants_rows()) << "how keys turn is not known yet";
    ASSERT_TRUE(source.see_turns(facts, stores, {}).ok());
    EXPECT_TRUE(source.wants_rows());
    for (int32_t p = 0; p < 131; ++p) {
        add(source, p);
    }
    EXPECT_FALSE(source.complete()) << "the first four do not count";
    add(source, 500, 1, std::numeric_limits<float>::quiet_NaN());
    add(source, 501, 1, 1e6F);
    EXPECT_FALSE(source.complete()) << "nor does what fp16 cannot hold";
    add(source, 131);
    EXPECT_TRUE(source.complete());
    EXPECT_TRUE(stores[0]->calibrating());
    ASSERT_TRUE(source.finish(stores, {}, {}).ok());
    EXPECT_EQ(source.state(), KeySource::State::rows);
    EXPECT_FALSE(source.wants_rows());
    for (const auto& store : stores) {
        EXPECT_FALSE(store->calibrating());
        EXPECT_NE(store->conditioning_id(), 0U);
        EXPECT_EQ(store->conditioning_id(), stores[0]->conditioning_id());
        EXPECT_NEAR(store->conditioning().mu[7], 20, 1);
        EXPECT_NEAR(store->conditioning().mu[8], 0, 1);
    }
}

TEST_F(KeySourceTest, RepeatedRowsDoNotCountHoweverLargeTheOffset) {
    KeySource source(nullptr, true);
    make_stores(source);
    ASSERT_TRUE(source.see_turns(facts, stores, {}).ok());
    for (int32_t p = 4; p < 400; ++p) {
        add(source, p, 0.02F);
    }
    EXPECT_FALSE(source.complete());
    for (int32_t p = 400; p < 400 + 125; ++p) { // three of the others were new
        EXPECT_FALSE(source.complete());
        add(source, p);
    }
    EXPECT_TRUE(source.complete());
}

TEST_F(KeySourceTest, UnknownTurnsEndTheWait) {
    KeySource source(nullptr, true);
    make_stores(source);
    facts.kind = RopeTrace::Kind::unknown;
    ASSERT_TRUE(source.see_turns(facts, stores, {}).ok());
    EXPECT_EQ(source.state(), KeySource::State::unknown);
    EXPECT_TRUE(source.calibrates());
    EXPECT_FALSE(source.wants_rows());
    EXPECT_FALSE(stores[0]->calibrating() || stores[1]->calibrating());
    EXPECT_EQ(stores[0]->conditioning_id(), 0U);
}

TEST_F(KeySourceTest, KeysThatDoNotTurnAreConditionedByOneMean) {
    KeySource source(nullptr, true);
    make_stores(source);
    facts.kind = RopeTrace::Kind::still;
    facts.pairs.clear();
    ASSERT_TRUE(source.see_turns(facts, stores, {}).ok());
    for (int32_t p = 0; p < 132; ++p) {
        add(source, p);
    }
    ASSERT_TRUE(source.complete());
    ASSERT_TRUE(source.finish(stores, {}, {}).ok());
    EXPECT_TRUE(stores[0]->conditioning().rope.empty());
    EXPECT_NEAR(stores[0]->conditioning().mu[7], 20, 1);
}

TEST_F(KeySourceTest, ProfileFollowsTheGraphAndIsChecked) {
    LayerProfile layer;
    layer.head_size = kHead;
    layer.kv_heads = kHeads;
    layer.keys.mu.assign(kHead * kHeads, 0.0F);
    for (size_t i = 0; i < layer.keys.mu.size(); i += 7) {
        layer.keys.mu[i] = 20;
    }
    layer.keys.rope = facts.pairs;
    for (const bool fits : {true, false}) {
        if (!fits) {
            std::rotate(layer.keys.mu.begin(), layer.keys.mu.begin() + 3, layer.keys.mu.end());
        }
        layer.keys.rope[3].theta *= 1.01F; // made with a slightly different setting
        KeySource source(&layer, true);
        EXPECT_EQ(source.calibration_rows(), 0);
        EXPECT_FALSE(source.calibrates());
        make_stores(source);
        const uint32_t before = stores[0]->conditioning_id();
        ASSERT_TRUE(source.see_turns(facts, stores, {}).ok());
        EXPECT_NE(stores[0]->conditioning_id(), before);
        EXPECT_TRUE(same_turns(stores[0]->conditioning().rope, facts.pairs));
        for (int32_t p = 0; p < 67; ++p) {
            add(source, p);
            EXPECT_FALSE(source.checked());
        }
        add(source, 67);
        EXPECT_TRUE(source.checked());
        EXPECT_EQ(source.doubtful(), !fits) << source.residual();
        layer.keys.rope = facts.pairs;
    }
}

TEST_F(KeySourceTest, TakesOverWhatSavedRowsBring) {
    KeySource source(nullptr, true);
    make_stores(source);
    ASSERT_TRUE(source.see_turns(facts, stores, {}).ok());
    Conditioning saved = {.mu = std::vector<float>(kHead * kHeads, 3.0F), .lambda = {}, .rope = facts.pairs};
    ASSERT_TRUE(source.adopt(saved, stores).ok());
    EXPECT_EQ(source.state(), KeySource::State::restored);
    EXPECT_FALSE(source.wants_rows());
    EXPECT_EQ(stores[1]->conditioning_id(), conditioning_id(saved, kHead, kHeads));
}

} // namespace
} // namespace turboquant::plugin
