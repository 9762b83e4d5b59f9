// Bits for each layer: the allocation within a budget, and what --kv auto makes of it.
#include "llm/bit_allocation.h"
#include "llm/error.h"
#include "llm/kv_choice.h"

#include <turboquant/codec.h>

#include <algorithm>
#include <cmath>
#include <random>

#include <gtest/gtest.h>

namespace {

using namespace turboquant::llm;

double total_cost(const std::vector<SideCost>& sides, const std::vector<int>& widths) {
    double sum = 0;
    for (size_t i = 0; i < sides.size(); ++i) {
        sum += cost_at(sides[i], widths[i]);
    }
    return sum;
}

// The least cost of any widths within the budget.
double best_cost(const std::vector<SideCost>& sides, double budget, std::vector<int>& widths, size_t at = 0) {
    if (at == sides.size()) {
        return mean_bits(sides, widths) <= budget + 1e-9 ? total_cost(sides, widths) : 1e300;
    }
    double best = 1e300;
    for (const int width : kWidths) {
        widths[at] = width;
        best = std::min(best, best_cost(sides, budget, widths, at + 1));
    }
    return best;
}

TEST(Allocation, EqualSidesGetEqualBits) {
    const std::vector<SideCost> sides(10, {128, .01, 3, 0});
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
        EXPECT_EQ(allocate_bits(sides, bits, 2), std::vector<int>(10, bits)) << bits;
    }
}

TEST(Allocation, CostlySidesGetMoreBitsAndTheBudgetIsMet) {
    const std::vector<SideCost> sides = {{128, .1, 3, 0}, {128, .001, 3, 0}, {128, .01, 3, 0}, {128, 0, 3, 0}};
    const std::vector<int> widths = allocate_bits(sides, 4, 2);
    EXPECT_GT(widths[0], widths[2]);
    EXPECT_GT(widths[2], widths[1]);
    EXPECT_LE(mean_bits(sides, widths), 4);
    EXPECT_LT(total_cost(sides, widths), total_cost(sides, {4, 4, 4, 4}));
    for (const int width : allocate_bits(sides, 4, 3)) {
        EXPECT_GE(width, 3);
    }
}

TEST(Allocation, NearTheBestOfAllForRandomCosts) {
    std::mt19937 random(1);
    std::lognormal_distribution<double> kld(-6, 1.5);
    for (int round = 0; round < 60; ++round) {
        std::vector<SideCost> sides;
        for (int i = 0; i < 5; ++i) {
            sides.push_back({round % 2 == 0 ? 128 : 64 << (random() % 3), kld(random), 3, 0});
        }
        const double budget = std::uniform_real_distribution<double>(2, 8)(random);
        const std::vector<int> widths = allocate_bits(sides, budget, 2);
        EXPECT_LE(mean_bits(sides, widths), budget + 1e-9);
        std::vector<int> scratch(sides.size());
        const double best = best_cost(sides, budget, scratch);
        // What cannot be spent is at most a step of the largest side.
        EXPECT_LE(total_cost(sides, widths), 2.5 * best) << budget;
        EXPECT_GE(total_cost(sides, widths), best * .999999);
    }
}

TEST(Allocation, CodebookErrorsAreThoseOfTheCodec) {
    using turboquant::Codebook;
    constexpr int kBlock = 128;
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (const int bits : kWidths) {
        double error = 0;
        double energy = 0;
        for (int round = 0; round < 2000; ++round) {
            float y[kBlock];
            float decoded[kBlock];
            uint8_t codes[kBlock];
            uint16_t scale = 0;
            for (float& v : y) {
                v = normal(random);
            }
            const Codebook& book = *turboquant::find_codebook(bits);
            turboquant::encode_block(y, kBlock, book, turboquant::ScaleRule::matched, codes, &scale,
                                     turboquant::Isa::portable);
            turboquant::decode_block(codes, kBlock, book, scale, decoded);
            for (int i = 0; i < kBlock; ++i) {
                error += static_cast<double>(y[i] - decoded[i]) * static_cast<double>(y[i] - decoded[i]);
                energy += static_cast<double>(y[i]) * static_cast<double>(y[i]);
            }
        }
        EXPECT_NEAR(error / energy / codebook_error(bits), 1, .03) << bits;
    }
}

TEST(Allocation, CostsFollowTheCodebooksError) {
    const SideCost side{64, .02, 3, 0};
    EXPECT_EQ(cost_at(side, 3), .02);
    EXPECT_NEAR(cost_at(side, 4) / cost_at(side, 2), codebook_error(4) / codebook_error(2), 1e-12);
    for (size_t i = 1; i < kWidths.size(); ++i) {
        EXPECT_LT(cost_at(side, kWidths[i]), cost_at(side, kWidths[i - 1]));
    }
    EXPECT_EQ(cost_at(side, 16), 0);
}

TEST(Shrinking, TakesAwayWhatIsNoise) {
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    const auto draw = [&](double spread, double noise) {
        std::vector<double> truth;
        std::vector<SideCost> sides;
        for (int i = 0; i < 400; ++i) {
            truth.push_back(-6 + spread * normal(random));
            const double kld = std::exp(truth.back() + noise * normal(random));
            sides.push_back({64, kld, 3, noise * kld});
        }
        std::vector<SideCost> shrunk = sides;
        std::vector<SideCost*> all;
        for (SideCost& side : shrunk) {
            all.push_back(&side);
        }
        shrink_costs(all);
        double before = 0;
        double after = 0;
        for (size_t i = 0; i < truth.size(); ++i) {
            before += std::pow(std::log(sides[i].kld) - truth[i], 2);
            after += std::pow(std::log(shrunk[i].kld) - truth[i], 2);
        }
        return after / before;
    };
    // The best that can be done leaves spread^2 / (spread^2 + noise^2) of the error.
    EXPECT_NEAR(draw(.3, .3), .5, .08);
    EXPECT_NEAR(draw(1, .1), .99, .02);
    EXPECT_LT(draw(0, .3), .06);
    SideCost dead{64, 0, 3, 0};
    SideCost one{64, .1, 3, .1};
    SideCost two{64, .2, 3, 0};
    SideCost three{64, .4, 3, 0};
    shrink_costs({&dead, &one, &two, &three});
    EXPECT_EQ(dead.kld, 0);
    EXPECT_DOUBLE_EQ(two.kld, .2) << "no noise, nothing to take away";
    EXPECT_GE(one.kld, .1);
}

TEST(Automatic, TakesItsBitsFromTheProfile) {
    KvChoice choice = parse_kv("auto");
    EXPECT_TRUE(choice.turboquant());
    EXPECT_FALSE(choice.pass_through());
    EXPECT_EQ(choice.bits(), "auto");
    EXPECT_EQ(choice.describe(), "auto (window 32, sinks 4)");
    choice.layer_bits = {{0, {5, 3}}, {7, {2, 8}}};
    choice.mean_bits = 4.5;
    EXPECT_EQ(choice.bits_of(7).key, 2);
    EXPECT_EQ(choice.bits_of(7).value, 8);
    EXPECT_EQ(choice.describe(), "auto (4.50 bits, window 32, sinks 4)");
    KvChoice fixed = parse_kv("4/3");
    fixed.layer_bits = choice.layer_bits;
    EXPECT_EQ(fixed.bits_of(7).key, 4) << "only auto asks the profile";
    EXPECT_EQ(fixed.bits_of(7).value, 3);
    EXPECT_TRUE(parse_kv("16/16").pass_through());
    EXPECT_FALSE(parse_kv("f16").pass_through());
    KvFlags flags;
    flags.kv = "auto";
    flags.window = 0;
    EXPECT_EQ(resolve_kv(flags).window, 0);
    flags.key_bits = 4;
    EXPECT_THROW(resolve_kv(flags), UsageError);
}

} // namespace
