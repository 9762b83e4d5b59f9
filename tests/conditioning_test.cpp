// Conditioning: block means against brute force, statistics against distributions whose answer is known, records.
#include "conditioning_testing.h"
#include "turboquant/codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace turboquant {
namespace {

using testing::Complex;
using testing::draw;
using testing::equal;
using testing::make_rope;
using testing::random_conditioning;
using testing::turn;
using testing::uniform;

Complex brute_force_mean(double theta, int block) {
    Complex sum = 0;
    for (int j = 0; j < kPositionBlock; ++j) {
        sum += std::polar(1.0, theta * (static_cast<double>(block) * kPositionBlock + j));
    }
    return sum / static_cast<double>(kPositionBlock);
}

TEST(BlockMean, EqualsTheMeanOverThePositionsOfTheBlock) {
    for (const float theta : {1.0F, -1.0F, .7498942F, .1F, .0123F, 1e-3F, 1e-4F, 1e-6F, 1e-12F, 0.0F, 2.0F, 3.1415927F,
                              6.2831855F, -6.2831855F, 12.566371F, 25.0F}) {
        Conditioning c;
        c.mu = {.75F, -1.25F, 2.5F, 8.0F, 0.5F, -4.0F}; // two heads of 3; channel 1 does not turn
        c.rope = {{2, 0, theta}};
        for (const int block : {0, 1, 2, 17, 255, 511, 4095, kMaxPositionBlock}) {
            const Complex mean = brute_force_mean(theta, block);
            std::vector<float> out(6, -99.0F);
            block_mean(c, 3, 2, block, out.data());
            for (const size_t head : {size_t{0}, size_t{3}}) {
                const Complex expected = Complex(c.mu[head + 2], c.mu[head]) * mean;
                EXPECT_NEAR(out[head + 2], expected.real(), 1e-5) << theta << " block " << block;
                EXPECT_NEAR(out[head], expected.imag(), 1e-5) << theta << " block " << block;
                EXPECT_EQ(out[head + 1], c.mu[head + 1]);
            }
        }
    }
}

TEST(BlockMean, PhasesTurnTheFirstBlocksMeanIntoAnyOther) {
    const std::vector<RopePair> rope = make_rope(64, 1e6, true);
    std::mt19937 random(1);
    Conditioning c;
    c.mu = uniform(random, 64, -2, 2);
    c.rope = rope;
    std::vector<float> first(64);
    std::vector<float> other(64);
    std::vector<float> cosine(rope.size());
    std::vector<float> sine(rope.size());
    block_mean(c, 64, 1, 0, first.data());
    for (const int block : {1, 3, 100, 511, 40000}) {
        block_mean(c, 64, 1, block, other.data());
        block_phases(rope, block, cosine.data(), sine.data());
        for (size_t i = 0; i < rope.size(); ++i) {
            const Complex turned = Complex(first[rope[i].first], first[rope[i].second]) * Complex(cosine[i], sine[i]);
            EXPECT_NEAR(turned.real(), other[rope[i].first], 1e-6);
            EXPECT_NEAR(turned.imag(), other[rope[i].second], 1e-6);
        }
    }
}

TEST(BlockMean, NoMeansAreZeros) {
    std::vector<float> out(8, 1.0F);
    block_mean(Conditioning{}, 4, 2, 7, out.data());
    EXPECT_EQ(out, std::vector<float>(8, 0.0F));
}

TEST(PositionBlock, HoldsWithinItsRange) {
    EXPECT_EQ(position_block(-5), 0);
    EXPECT_EQ(position_block(0), 0);
    EXPECT_EQ(position_block(255), 0);
    EXPECT_EQ(position_block(256), 1);
    EXPECT_EQ(position_block(int64_t{1} << 40), kMaxPositionBlock);
}

struct Sampled {
    std::vector<float> mean; // before the turn
    std::vector<float> deviation;
    std::vector<RopePair> rope;
    KeyStatistics statistics;
};

// Two heads of 64, the last 16 channels in no pair; n keys, the k-th at position first + k * stride.
Sampled sample(int64_t n, int64_t first, int64_t stride, unsigned seed) {
    std::mt19937 random(seed);
    const std::vector<RopePair> rope = make_rope(48, 10000, false);
    Sampled s{uniform(random, 128, -4, 4), uniform(random, 128, .2F, 1.0F), rope, KeyStatistics(64, 2, rope)};
    const std::vector<float> zeros(64);
    const std::vector<float> ones(64, 1.0F);
    for (int64_t k = 0; k < n; ++k) {
        std::vector<float> key = draw(random, s.mean, s.deviation);
        turn(key, 64, s.rope, first + k * stride);
        s.statistics.add_key(key.data(), first + k * stride);
        s.statistics.add_query(draw(random, zeros, ones).data(), 0);
        s.statistics.add_query(draw(random, zeros, ones).data(), 1);
    }
    return s;
}

// Root of the mean squared error of mu over the size of the truth.
double mean_error(const Conditioning& c, const std::vector<float>& truth) {
    double error = 0;
    double size = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
        error += std::pow(static_cast<double>(c.mu[i]) - static_cast<double>(truth[i]), 2);
        size += std::pow(static_cast<double>(truth[i]), 2);
    }
    return std::sqrt(error / size);
}

TEST(Statistics, FindsTheMeanBeforeTheTurnWhateverPositionsItSaw) {
    // Noise of 0.6 in n rows about means of 2.3: 0.6 / 2.3 / sqrt(n), and 2 / n from the prior.
    const Sampled spread = sample(2000, 4, 7, 1);
    EXPECT_LT(mean_error(spread.statistics.conditioning(), spread.mean), .01);
    const Sampled first = sample(128, 4, 1, 2);
    EXPECT_LT(mean_error(first.statistics.conditioning(), first.mean), .04);
    const Sampled late = sample(128, 100000, 1, 3);
    EXPECT_LT(mean_error(late.statistics.conditioning(), late.mean), .04);
    EXPECT_EQ(spread.statistics.keys(), 2000);
}

TEST(Statistics, AFewRowsServeTheWholeContext) {
    // What the plain mean of 128 rows cannot do: fit keys thousands of positions later.
    const Sampled early = sample(128, 4, 1, 4);
    const Conditioning c = early.statistics.conditioning();
    KeyStatistics plain(64, 2, {});
    KeyStatistics later(64, 2, early.rope);
    KeyStatistics later_plain(64, 2, {});
    std::mt19937 random(5);
    for (int64_t p = 4; p < 132; ++p) {
        std::vector<float> key = draw(random, early.mean, early.deviation);
        turn(key, 64, early.rope, p);
        plain.add_key(key.data(), p);
        plain.add_query(key.data(), 0);
    }
    for (int64_t p = 20000; p < 22000; ++p) {
        std::vector<float> key = draw(random, early.mean, early.deviation);
        turn(key, 64, early.rope, p);
        later.add_key(key.data(), p);
        later_plain.add_key(key.data(), p);
    }
    const double with_blocks = later.residual(c);
    const double without = later_plain.residual(plain.conditioning());
    EXPECT_LT(with_blocks, .5) << "the slow pairs' and the resting channels' means are taken off";
    EXPECT_GT(without, with_blocks + .2);
}

TEST(Statistics, ResidualEqualsItsDefinition) {
    std::mt19937 random(6);
    const std::vector<RopePair> rope = make_rope(16, 500, true);
    const Conditioning c = random_conditioning(random, 16, 3);
    Conditioning known = c;
    known.rope = rope;
    KeyStatistics statistics(16, 3, rope);
    double left = 0;
    double energy = 0;
    std::vector<float> mean(48);
    for (int64_t p = 4; p < 6000; p += 11) {
        std::vector<float> key = draw(random, known.mu, std::vector<float>(48, 1.0F));
        turn(key, 16, rope, p);
        statistics.add_key(key.data(), p);
        block_mean(known, 16, 3, position_block(p), mean.data());
        for (size_t i = 0; i < key.size(); ++i) {
            left += std::pow(static_cast<double>(key[i]) - static_cast<double>(mean[i]), 2);
            energy += std::pow(static_cast<double>(key[i]), 2);
        }
    }
    EXPECT_NEAR(statistics.residual(known), left / energy, 1e-6);
    EXPECT_LT(statistics.residual(known), .9);
    Conditioning stranger = random_conditioning(random, 16, 3);
    stranger.rope = rope;
    EXPECT_GT(statistics.residual(stranger), 1.0);
    EXPECT_EQ(statistics.residual(c), std::numeric_limits<double>::infinity()) << "other pairs";
    EXPECT_EQ(statistics.residual(random_conditioning(random, 16, 2)), std::numeric_limits<double>::infinity());
    EXPECT_EQ(statistics.residual(Conditioning{}), 1.0);
    EXPECT_EQ(KeyStatistics(16, 3, rope).residual(known), 1.0);
}

// Error of a logit, up to a factor: sum s / lambda^2 times sum lambda^2 v (algorithm.md, "lambda, exactly").
double logit_error(const std::vector<double>& s, const std::vector<double>& v, const float* lambda) {
    double query = 0;
    double key = 0;
    for (size_t i = 0; i < s.size(); ++i) {
        const double l2 = static_cast<double>(lambda[i]) * static_cast<double>(lambda[i]);
        query += s[i] / l2;
        key += l2 * v[i];
    }
    return query * key;
}

TEST(Statistics, FactorsAreThoseOfTheFormulaAndHelp) {
    constexpr int kHead = 32;
    std::mt19937 random(7);
    const std::vector<RopePair> rope = make_rope(24, 10000, false); // channels 24..31 do not turn
    const std::vector<float> mean = uniform(random, kHead, -1, 1);
    std::vector<float> key_deviation(kHead);
    std::vector<float> query_deviation(kHead);
    for (int i = 0; i < kHead; ++i) {
        key_deviation[static_cast<size_t>(i)] = i % 5 == 0 ? 4.0F : .5F;
        query_deviation[static_cast<size_t>(i)] = i % 7 == 0 ? 5.0F : .4F;
    }
    KeyStatistics statistics(kHead, 1, rope);
    std::vector<Complex> pair_sum(rope.size());
    std::vector<double> sum(kHead);
    std::vector<double> square(kHead);
    std::vector<double> asked(kHead);
    constexpr int kRows = 1500;
    for (int64_t p = 4; p < 4 + kRows; ++p) {
        std::vector<float> key = draw(random, mean, key_deviation);
        turn(key, kHead, rope, p);
        std::vector<float> query = draw(random, std::vector<float>(kHead), query_deviation);
        statistics.add_key(key.data(), p);
        statistics.add_query(query.data(), 0);
        for (size_t i = 0; i < kHead; ++i) {
            sum[i] += static_cast<double>(key[i]);
            square[i] += std::pow(static_cast<double>(key[i]), 2) / kRows;
            asked[i] += std::pow(static_cast<double>(query[i]), 2) / kRows;
        }
        for (size_t i = 0; i < rope.size(); ++i) {
            pair_sum[i] += Complex(key[rope[i].first], key[rope[i].second]) *
                           std::polar(1.0, -static_cast<double>(rope[i].theta) * static_cast<double>(p));
        }
    }
    // The formula, written out once more.
    std::vector<double> v(kHead);
    std::vector<double> s = asked;
    for (size_t i = 24; i < kHead; ++i) {
        v[i] = std::max(square[i] - std::pow(sum[i] / (kRows + 2), 2), .02 * square[i]);
    }
    for (size_t i = 0; i < rope.size(); ++i) {
        const size_t a = rope[i].first;
        const size_t b = rope[i].second;
        const double energy = square[a] + square[b];
        const Complex mu = pair_sum[i] / (kRows + 2.0) * brute_force_mean(rope[i].theta, 3);
        v[a] = v[b] = std::max(energy - std::norm(mu), .02 * energy) / 2;
        s[a] = s[b] = (asked[a] + asked[b]) / 2;
    }
    double v_mean = 0;
    double s_mean = 0;
    for (size_t i = 0; i < kHead; ++i) {
        v_mean += v[i] / kHead;
        s_mean += s[i] / kHead;
    }
    std::vector<double> expected(kHead);
    double log_mean = 0;
    for (size_t i = 0; i < kHead; ++i) {
        expected[i] = std::pow((s[i] + .01 * s_mean) / (v[i] + .01 * v_mean), .25);
        log_mean += std::log(expected[i]) / kHead;
    }
    const Conditioning c = statistics.conditioning();
    double log_sum = 0;
    for (size_t i = 0; i < kHead; ++i) {
        EXPECT_NEAR(c.lambda[i] / (expected[i] / std::exp(log_mean)), 1.0, 1e-3) << "channel " << i;
        log_sum += std::log(static_cast<double>(c.lambda[i]));
    }
    EXPECT_NEAR(log_sum, 0.0, 5e-3) << "geometric mean 1";
    for (const RopePair& pair : rope) {
        EXPECT_EQ(c.lambda[pair.first], c.lambda[pair.second]);
    }
    const std::vector<float> ones(kHead, 1.0F);
    EXPECT_LT(logit_error(s, v, c.lambda.data()), .7 * logit_error(s, v, ones.data()));
    // No better factors nearby: the formula's are the optimum.
    for (size_t i = 24; i < kHead; ++i) {
        for (const float f : {.8F, 1.25F}) {
            std::vector<float> other = c.lambda;
            other[i] *= f;
            EXPECT_GT(logit_error(s, v, other.data()), logit_error(s, v, c.lambda.data())) << i << " " << f;
        }
    }
}

TEST(Statistics, DeadChannelsHeadsAndMissingQueriesAreServed) {
    std::mt19937 random(8);
    const std::vector<RopePair> rope = make_rope(8, 10000, true);
    KeyStatistics statistics(8, 3, rope);
    EXPECT_TRUE(statistics.conditioning().empty());
    for (int64_t p = 4; p < 100; ++p) {
        std::vector<float> key = uniform(random, 24, -1, 1);
        key[2] = key[3] = 0;                                // a pair of head 0 that is always zero
        std::fill(key.begin() + 8, key.begin() + 16, 0.0F); // a head of zeros
        statistics.add_key(key.data(), p);
    }
    EXPECT_TRUE(statistics.conditioning().empty()) << "no query yet";
    for (int i = 0; i < 10; ++i) {
        statistics.add_query(uniform(random, 8, -1, 1).data(), 0);
        statistics.add_query(uniform(random, 8, -1, 1).data(), 1); // none for head 2
    }
    const Conditioning c = statistics.conditioning();
    ASSERT_TRUE(check_conditioning(c, 8, 3).ok());
    EXPECT_GT(c.lambda[2], c.lambda[0]) << "the zero pair needs no room of the quantiser";
    EXPECT_LT(c.lambda[2], 10.0F);
    for (size_t i = 8; i < 24; ++i) {
        EXPECT_EQ(c.lambda[i], 1.0F);
    }
}

TEST(Statistics, SameRowsGiveTheSameBytes) {
    const Conditioning a = sample(300, 4, 1, 9).statistics.conditioning();
    const Conditioning b = sample(300, 4, 1, 9).statistics.conditioning();
    EXPECT_EQ(write_conditioning(a, 64, 2), write_conditioning(b, 64, 2));
    EXPECT_TRUE(equal(a, storable(a))) << "what is used is what is saved";
}

TEST(Statistics, RepeatedRowsAreSeenAndOrdinaryOnesNot) {
    std::mt19937 random(10);
    const std::vector<RopePair> rope = make_rope(64, 10000, false);
    const std::vector<float> mean = uniform(random, 128, -1, 1);
    const std::vector<float> other_mean = uniform(random, 128, -1, 1);
    const std::vector<float> wide(128, 1.0F);
    const std::vector<float> narrow(128, .03F); // what context adds to the key of one and the same token
    constexpr double kSame = 2;                 // narrow rows are .23 apart, wide ones 256
    KeyStatistics statistics(64, 2, rope);
    for (int64_t p = 0; p < 200; ++p) {
        std::vector<float> key = draw(random, mean, wide);
        turn(key, 64, rope, p);
        EXPECT_FALSE(statistics.repeats(key.data(), p, 1, kSame)) << p;
    }
    int counted = 0;
    for (int64_t p = 200; p < 300; ++p) {
        std::vector<float> key = draw(random, other_mean, narrow);
        turn(key, 64, rope, p);
        counted += statistics.repeats(key.data(), p, 3, kSame) ? 0 : 1;
    }
    EXPECT_EQ(counted, 3) << "the fourth of a kind is a repeat, whatever its position";
    for (int64_t p = 300; p < 2000; ++p) { // more than are remembered
        std::vector<float> key = draw(random, mean, wide);
        turn(key, 64, rope, p);
        EXPECT_FALSE(statistics.repeats(key.data(), p, 1, kSame)) << p;
    }
    std::vector<float> key = draw(random, other_mean, narrow);
    turn(key, 64, rope, 5000);
    EXPECT_TRUE(statistics.repeats(key.data(), 5000, 3, kSame)) << "early rows are not forgotten";
}

TEST(Statistics, RowsOfZerosRepeatEachOther) {
    KeyStatistics statistics(4, 1, {});
    const std::vector<float> zeros(4);
    EXPECT_FALSE(statistics.repeats(zeros.data(), 0, 1, 0));
    EXPECT_TRUE(statistics.repeats(zeros.data(), 1, 1, 0));
}

TEST(Check, RefusesWhatCannotBeUsed) {
    std::mt19937 random(11);
    const Conditioning good = random_conditioning(random, 16, 2);
    EXPECT_TRUE(check_conditioning(good, 16, 2).ok());
    EXPECT_TRUE(check_conditioning(Conditioning{}, 16, 2).ok());
    EXPECT_FALSE(check_conditioning(good, 16, 3).ok());
    EXPECT_FALSE(check_conditioning(good, 32, 2).ok());
    EXPECT_FALSE(check_conditioning(Conditioning{}, 0, 2).ok());
    EXPECT_FALSE(check_conditioning(Conditioning{}, 16, 0).ok());
    const float infinity = std::numeric_limits<float>::infinity();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const float l : {0.0F, -1.0F, infinity, nan, 1e-45F}) {
        Conditioning bad = good;
        bad.lambda[5] = l;
        EXPECT_FALSE(check_conditioning(bad, 16, 2).ok()) << l;
    }
    for (const float m : {infinity, -infinity, nan}) {
        Conditioning bad = good;
        bad.mu[31] = m;
        EXPECT_FALSE(check_conditioning(bad, 16, 2).ok()) << m;
        bad = good;
        bad.rope[1].theta = m;
        EXPECT_FALSE(check_conditioning(bad, 16, 2).ok()) << m;
    }
    Conditioning bad = good;
    bad.rope[1].second = 16;
    EXPECT_FALSE(check_conditioning(bad, 16, 2).ok());
    bad.rope[1].second = bad.rope[0].first;
    EXPECT_FALSE(check_conditioning(bad, 16, 2).ok());
    bad.rope[1].second = bad.rope[1].first;
    const Status status = check_conditioning(bad, 16, 2);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
}

TEST(Storable, FitsFp16) {
    Conditioning c;
    c.mu = {1e9F, -1e9F, 1.0F / 3, 0};
    c.lambda = {1e-9F, 1e9F, 1.0F / 3, 1};
    const Conditioning s = storable(c);
    EXPECT_TRUE(check_conditioning(s, 4, 1).ok());
    EXPECT_EQ(s.mu[0], 65504.0F);
    EXPECT_EQ(s.mu[1], -65504.0F);
    EXPECT_EQ(s.lambda[0], 0x1p-14F) << "a normal fp16";
    EXPECT_EQ(s.lambda[1], 65504.0F);
    EXPECT_NEAR(s.lambda[2], 1.0 / 3, 1e-4);
    EXPECT_TRUE(equal(s, storable(s)));
}

TEST(Record, ComesBackAsItWas) {
    std::mt19937 random(12);
    const Conditioning whole = random_conditioning(random, 16, 2);
    Conditioning only_mu = whole;
    only_mu.lambda.clear();
    Conditioning only_lambda = whole;
    only_lambda.mu.clear();
    Conditioning no_rope = whole;
    no_rope.rope.clear();
    for (const Conditioning& c : {whole, only_mu, only_lambda, no_rope, Conditioning{}}) {
        std::vector<uint8_t> record = write_conditioning(c, 16, 2);
        Conditioning back = whole;
        ASSERT_TRUE(read_conditioning(record.data(), record.size(), 16, 2, back).ok());
        EXPECT_TRUE(equal(back, c));
        record.resize(record.size() + 37); // pieces of saved rows end in zeros
        ASSERT_TRUE(read_conditioning(record.data(), record.size(), 16, 2, back).ok());
        EXPECT_TRUE(equal(back, c));
        record.back() = 1;
        EXPECT_FALSE(read_conditioning(record.data(), record.size(), 16, 2, back).ok());
    }
}

TEST(Record, EveryDamageIsRefusedAndNothingIsChanged) {
    std::mt19937 random(13);
    const Conditioning c = random_conditioning(random, 8, 2);
    const Conditioning before = random_conditioning(random, 4, 1);
    const std::vector<uint8_t> record = write_conditioning(c, 8, 2);
    for (size_t i = 0; i < record.size(); ++i) {
        for (const int flip : {1, 0x80, 0xff}) {
            std::vector<uint8_t> bad = record;
            bad[i] = static_cast<uint8_t>(bad[i] ^ flip);
            Conditioning out = before;
            const Status status = read_conditioning(bad.data(), bad.size(), 8, 2, out);
            EXPECT_FALSE(status.ok()) << "byte " << i << " ^ " << flip;
            EXPECT_EQ(status.message().find('\n'), std::string::npos);
            EXPECT_TRUE(equal(out, before));
        }
    }
    for (size_t n = 0; n < record.size(); ++n) {
        const std::vector<uint8_t> cut(record.begin(), record.begin() + static_cast<ptrdiff_t>(n));
        Conditioning out;
        EXPECT_FALSE(read_conditioning(cut.data(), cut.size(), 8, 2, out).ok()) << n;
    }
    Conditioning out;
    EXPECT_FALSE(read_conditioning(record.data(), record.size(), 16, 1, out).ok());
    EXPECT_FALSE(read_conditioning(record.data(), record.size(), 8, 1, out).ok());
    EXPECT_TRUE(out.empty());
}

TEST(Record, IdTellsEveryDifference) {
    std::mt19937 random(14);
    const Conditioning c = random_conditioning(random, 8, 2);
    const uint32_t id = conditioning_id(c, 8, 2);
    EXPECT_EQ(conditioning_id(c, 8, 2), id);
    EXPECT_EQ(conditioning_id(storable(c), 8, 2), id);
    EXPECT_NE(id, 0U);
    EXPECT_EQ(conditioning_id(Conditioning{}, 8, 2), 0U);
    EXPECT_NE(conditioning_id(c, 16, 1), id);
    std::vector<uint32_t> ids = {id};
    for (size_t i = 0; i < c.mu.size(); ++i) {
        Conditioning other = c;
        other.mu[i] = from_half(static_cast<uint16_t>(to_half(other.mu[i]) ^ 1));
        ids.push_back(conditioning_id(other, 8, 2));
        other = c;
        other.lambda[i] = from_half(static_cast<uint16_t>(to_half(other.lambda[i]) ^ 1));
        ids.push_back(conditioning_id(other, 8, 2));
    }
    for (size_t i = 0; i < c.rope.size(); ++i) {
        Conditioning other = c;
        other.rope[i].theta *= 1.0000002F;
        ids.push_back(conditioning_id(other, 8, 2));
        other = c;
        std::swap(other.rope[i].first, other.rope[i].second);
        ids.push_back(conditioning_id(other, 8, 2));
    }
    Conditioning other = c;
    other.rope.clear();
    ids.push_back(conditioning_id(other, 8, 2));
    other = c;
    other.mu.clear();
    ids.push_back(conditioning_id(other, 8, 2));
    std::sort(ids.begin(), ids.end());
    EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end());
    EXPECT_NE(ids.front(), 0U);
}

} // namespace
} // namespace turboquant
