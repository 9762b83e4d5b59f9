// tq eval without a model: the figures against plain arithmetic, where chunks lie, the base's file, needles.
#include "llm/base_cache.h"
#include "llm/error.h"
#include "llm/evaluation.h"
#include "llm/needles.h"
#include "llm/user_cache.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <string>

#include <ggml.h>
#include <gtest/gtest.h>
#include <unistd.h>

namespace {

using namespace turboquant::llm;
namespace fs = std::filesystem;

std::vector<float> random_logits(uint32_t seed, size_t n, double spread) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, spread);
    std::vector<float> logits(n);
    for (float& logit : logits) {
        logit = static_cast<float>(normal(random));
    }
    return logits;
}

// Softmax without any care for range: fine for small logits in long double.
std::vector<long double> plain_softmax(const std::vector<float>& logits) {
    std::vector<long double> p;
    long double sum = 0;
    for (const float logit : logits) {
        p.push_back(std::exp(static_cast<long double>(logit)));
        sum += p.back();
    }
    for (long double& value : p) {
        value /= sum;
    }
    return p;
}

double plain_kld(const std::vector<float>& base, const std::vector<float>& test) {
    const auto p = plain_softmax(base);
    const auto q = plain_softmax(test);
    long double sum = 0;
    for (size_t i = 0; i < p.size(); ++i) {
        sum += p[i] * std::log(p[i] / q[i]);
    }
    return static_cast<double>(sum);
}

Score compare_logits(const std::vector<float>& base, const std::vector<float>& test, Token next) {
    std::vector<uint16_t> stored(base.size());
    const auto n = static_cast<int64_t>(base.size());
    return compare(make_base_row(base.data(), n, next, stored.data()), test.data(), n, next);
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

TEST(EvalArithmetic, KldAgainstBruteForce) {
    for (const double difference : {3.0, 0.3, 0.03}) {
        const auto base = random_logits(1, 5000, 3);
        const auto noise = random_logits(2, 5000, difference);
        std::vector<float> test = base;
        for (size_t i = 0; i < test.size(); ++i) {
            test[i] += noise[i];
        }
        const double expected = plain_kld(base, test);
        // What fp16 log-probabilities are good for.
        EXPECT_NEAR(compare_logits(base, test, 7).kld, expected, 4e-3 * expected + 5e-6) << difference;
    }
}

TEST(EvalArithmetic, KldOfWhatIsStoredIsExact) {
    const auto base = random_logits(3, 2000, 3);
    const auto test = random_logits(4, 2000, 3);
    std::vector<uint16_t> stored(base.size());
    const BaseRow row = make_base_row(base.data(), 2000, 0, stored.data());
    const auto q = plain_softmax(test);
    long double expected = 0;
    for (size_t i = 0; i < stored.size(); ++i) {
        const long double log_p = ggml_fp16_to_fp32(stored[i]);
        const long double p = std::exp(log_p);
        expected += p * (log_p - std::log(q[i])) - p + q[i];
    }
    EXPECT_NEAR(compare(row, test.data(), 2000, 0).kld, static_cast<double>(expected), 1e-10);
}

TEST(EvalArithmetic, RoundingOfTheBaseDoesNotShow) {
    const auto logits = random_logits(5, 50000, 3);
    const Score score = compare_logits(logits, logits, 11);
    EXPECT_LT(std::abs(score.kld), 2e-6);
    EXPECT_GE(score.kld, 0);
    EXPECT_TRUE(score.top1);
    EXPECT_NEAR(score.nll, score.nll_base, 1e-12);
}

TEST(EvalArithmetic, KnownDistributions) {
    const std::vector<float> uniform = {0, 0, 0, 0};
    const std::vector<float> skewed = {std::log(0.4F), std::log(0.3F), std::log(0.2F), std::log(0.1F)};
    const double expected =
        0.25 * (std::log(0.25 / 0.4) + std::log(0.25 / 0.3) + std::log(0.25 / 0.2) + std::log(0.25 / 0.1));
    const Score score = compare_logits(uniform, skewed, 3);
    EXPECT_NEAR(score.kld, expected, 1e-3 * expected);
    EXPECT_NEAR(score.nll, -std::log(0.1), 1e-6);
    EXPECT_NEAR(score.nll_base, std::log(4.0), 1e-9);
    EXPECT_FALSE(compare_logits({3, 1, 2}, {1, 3, 2}, 0).top1);
    EXPECT_TRUE(compare_logits({3, 1, 2}, {3, 2, 1}, 0).top1);
}

TEST(EvalArithmetic, ExtremeLogits) {
    const std::vector<float> large = {30000, 29999, -30000};
    EXPECT_NEAR(log_sum_exp(large.data(), 3), 30000 + std::log(1 + std::exp(-1.0)), 1e-9);
    EXPECT_TRUE(std::isfinite(compare_logits(large, large, 0).kld));
    // A token that the model rules out has probability 0 in both.
    const std::vector<float> masked = {1, 2, -INFINITY};
    EXPECT_NEAR(compare_logits(masked, masked, 0).kld, 0, 1e-6);
    EXPECT_THROW(compare_logits({1, 2}, {1, NAN}, 0), Error);
    EXPECT_THROW(compare_logits({1, NAN}, {1, 2}, 0), Error);
    const std::vector<float> infinite = {1, INFINITY};
    EXPECT_THROW(negative_log_likelihood(infinite.data(), 2, 0), Error);
}

TEST(EvalArithmetic, Quantiles) {
    EXPECT_DOUBLE_EQ(quantile({4, 1, 3, 2}, 0.5), 2.5);
    EXPECT_DOUBLE_EQ(quantile({4, 1, 3, 2}, 0), 1);
    EXPECT_DOUBLE_EQ(quantile({4, 1, 3, 2}, 1), 4);
    EXPECT_DOUBLE_EQ(quantile({7}, 0.99), 7);
    std::vector<double> hundred(101);
    for (size_t i = 0; i < hundred.size(); ++i) {
        hundred[i] = static_cast<double>(100 - i);
    }
    EXPECT_NEAR(quantile(hundred, 0.99), 99, 1e-12);
}

TEST(EvalArithmetic, StandardError) {
    EXPECT_NEAR(standard_error({1, 2, 3}), 1 / std::sqrt(3.0), 1e-15);
    EXPECT_DOUBLE_EQ(standard_error({5, 5, 5, 5}), 0);
    EXPECT_TRUE(std::isnan(standard_error({1})));
}

TEST(EvalArithmetic, Summary) {
    std::vector<std::vector<Score>> chunks(2);
    chunks[0] = {{0.1, 1, 2, true}, {0.3, 2, 2, true}};
    chunks[1] = {{0.2, 3, 1, false}, {0.6, 2, 1, true}};
    const Figures figures = summarise(chunks);
    EXPECT_EQ(figures.positions, 4);
    EXPECT_NEAR(figures.kld_mean, 0.3, 1e-15);
    EXPECT_NEAR(figures.kld_chunks[0], 0.2, 1e-15);
    EXPECT_NEAR(figures.kld_chunks[1], 0.4, 1e-15);
    EXPECT_NEAR(figures.kld_se, 0.1, 1e-15); // of .2 and .4, not of the four positions
    EXPECT_NEAR(figures.kld_median, 0.25, 1e-15);
    EXPECT_DOUBLE_EQ(figures.kld_max, 0.6);
    EXPECT_DOUBLE_EQ(figures.top1, 0.75);
    EXPECT_NEAR(figures.ppl, std::exp(2.0), 1e-12);
    EXPECT_NEAR(figures.ppl_base, std::exp(1.5), 1e-12);
    EXPECT_NEAR(figures.ppl_se, std::exp(2.0) * 0.5, 1e-12);
}

// ---- chunks and settings -------------------------------------------------------------------------------------------

TEST(EvalChunks, SpreadOverTheTextWithoutOverlap) {
    for (const int64_t tokens : {8192, 8193, 100000, 12345}) {
        const std::vector<int64_t> starts = chunk_starts(tokens, 2048, 4);
        ASSERT_EQ(starts.size(), 4U);
        for (size_t i = 0; i < starts.size(); ++i) {
            // In its own quarter of the text, as far from its start as from its end.
            const auto index = static_cast<int64_t>(i);
            const int64_t before = starts[i] - tokens * index / 4;
            const int64_t after = tokens * (index + 1) / 4 - starts[i] - 2048;
            EXPECT_GE(before, 0) << tokens;
            EXPECT_GE(after, 0) << tokens;
            EXPECT_LE(std::abs(before - after), 1) << tokens;
        }
    }
    EXPECT_THROW(chunk_starts(8191, 2048, 4), UsageError);
}

TEST(EvalChunks, SecondHalvesAreScored) {
    const std::vector<int64_t> all = scored_positions(2048, 1);
    EXPECT_EQ(all.size(), 1023U);
    EXPECT_EQ(all.front(), 1024);
    EXPECT_EQ(all.back(), 2046); // the last token of a chunk has no next one
    EXPECT_EQ(scored_positions(4096, 4).size(), 512U);
    EXPECT_EQ(scored_positions(4096, 4)[1], 2052);
    EXPECT_EQ(scored_positions(16, 1000).size(), 1U);
}

TEST(EvalSettings, SuffixesAndOverrides) {
    const std::vector<Setting> settings = parse_settings("tq4,tq4:w0,5/4:w8:s2,q8_0", {}, 3);
    ASSERT_EQ(settings.size(), 4U);
    EXPECT_EQ(settings[0].label, "tq4");
    EXPECT_EQ(settings[0].kv.window, 32);
    EXPECT_EQ(settings[0].kv.sinks, 3);
    EXPECT_EQ(settings[1].label, "tq4:w0");
    EXPECT_EQ(settings[1].kv.window, 0);
    EXPECT_EQ(settings[2].kv.key_bits, 5);
    EXPECT_EQ(settings[2].kv.window, 8);
    EXPECT_EQ(settings[2].kv.sinks, 2); // its own wins
    EXPECT_FALSE(settings[3].kv.turboquant());
    for (const char* bad :
         {"tq4:", "tq4:w", "tq4:x3", "tq4:w-1", "tq4:w1:w2", "tq4:w1x", "q8_0:w4", "tq9", "", "tq4,,tq5"}) {
        EXPECT_THROW(parse_settings(bad, {}, {}), UsageError) << bad;
    }
}

TEST(EvalSettings, BitsAndBytes) {
    CachePlan plan;
    plan.context = 1024;
    for (int i = 0; i < 3; ++i) {
        plan.layers.push_back({i, i == 1, i == 1 ? 256 : 1024, 2, 64, 64});
    }
    plan = full_cache_plan(plan);
    EXPECT_EQ(plan.layers[1].cells, 1024);
    const auto of = [&](const char* text) { return footprint(plan, parse_settings(text, {}, {}).front().kv); };
    EXPECT_DOUBLE_EQ(of("f16").bits_per_value, 16);
    EXPECT_DOUBLE_EQ(of("f16").bytes_per_token, 3 * 2 * 2 * 64 * 2);
    EXPECT_DOUBLE_EQ(of("q8_0").bits_per_value, 8.5);
    EXPECT_DOUBLE_EQ(of("q4_0").bits_per_value, 4.5);
    EXPECT_DOUBLE_EQ(of("4/4").bits_per_value, 4.25); // a scale of 16 bits for 64 values
    EXPECT_DOUBLE_EQ(of("5/4").bits_per_value, 4.75);
    EXPECT_DOUBLE_EQ(of("16/16").bits_per_value, 16);
    // As allocated: codes and scales, and little more.
    EXPECT_GE(of("4/4").bytes_per_token, 4.25 * 768 / 8);
    EXPECT_LE(of("4/4").bytes_per_token, 4.25 * 768 / 8 * 1.02 + 3 * 2 * 2);
    EXPECT_DOUBLE_EQ(of("4/4:w0:s0").bytes_per_token, of("4/4:w128:s4").bytes_per_token);
    EXPECT_GE(of("4/4:w128:s4").exact_bytes, 132 * 768 * 2);
    EXPECT_EQ(of("4/4:w0:s0").exact_bytes, 0);
    EXPECT_EQ(of("q8_0").exact_bytes, 0);
}

// ---- the base's file -----------------------------------------------------------------------------------------------

class EvalBase : public testing::Test {
protected:
    void SetUp() override {
        folder_ = fs::temp_directory_path() / ("tq_eval_test_" + std::to_string(getpid()));
        fs::create_directories(folder_);
        path_ = folder_ / "base.bin";
        for (uint32_t i = 0; i < kRows; ++i) {
            logits_.push_back(random_logits(i, kVocabulary, 2));
        }
    }
    void TearDown() override { fs::remove_all(folder_); }

    void write(const std::string& key) const {
        BaseWriter writer(path_, key, kVocabulary, kRows);
        std::vector<uint16_t> stored(kVocabulary);
        for (const auto& logits : logits_) {
            writer.add(make_base_row(logits.data(), kVocabulary, 5, stored.data()));
        }
        writer.finish();
    }
    std::unique_ptr<BaseFile> open(const std::string& key, bool& damaged) const {
        return BaseFile::open(path_, key, kVocabulary, kRows, damaged);
    }

    static constexpr int64_t kVocabulary = 777; // rows end in the middle of a word
    static constexpr int64_t kRows = 5;
    fs::path folder_;
    fs::path path_;
    std::vector<std::vector<float>> logits_;
};

TEST_F(EvalBase, ComesBack) {
    bool damaged = true;
    EXPECT_EQ(open("a key", damaged), nullptr);
    EXPECT_FALSE(damaged); // none there is no damage
    write("a key");
    const auto file = open("a key", damaged);
    ASSERT_NE(file, nullptr);
    EXPECT_FALSE(damaged);
    for (int64_t i = 0; i < kRows; ++i) {
        std::vector<uint16_t> stored(kVocabulary);
        const BaseRow expected = make_base_row(logits_[static_cast<size_t>(i)].data(), kVocabulary, 5, stored.data());
        const BaseRow row = file->row(i);
        EXPECT_EQ(row.top, expected.top);
        EXPECT_EQ(row.nll, expected.nll);
        EXPECT_TRUE(std::equal(stored.begin(), stored.end(), row.log_probs));
    }
    EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1); // no temporary file is left
}

TEST_F(EvalBase, DamageIsSeen) {
    write("a key");
    bool damaged = false;
    const auto size = fs::file_size(path_);
    for (const auto shorter : {size - 1, size / 2, uintmax_t{8}, uintmax_t{0}}) {
        write("a key");
        fs::resize_file(path_, shorter);
        EXPECT_EQ(open("a key", damaged), nullptr) << shorter;
        EXPECT_TRUE(damaged) << shorter;
    }
    for (const auto at : {uintmax_t{3}, uintmax_t{18}, size / 2, size - 3}) { // magic, key, rows (also their padding)
        write("a key");
        std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
        file.seekg(static_cast<std::streamoff>(at));
        const auto byte = static_cast<char>(file.get() ^ 4);
        file.seekp(static_cast<std::streamoff>(at));
        file.put(byte);
        file.close();
        EXPECT_EQ(open("a key", damaged), nullptr) << at;
        EXPECT_TRUE(damaged) << at;
    }
    write("a key");
    EXPECT_EQ(open("my key", damaged), nullptr);
    EXPECT_EQ(open("a ke", damaged), nullptr);
    EXPECT_EQ(open("another key", damaged), nullptr);
    EXPECT_NE(open("a key", damaged), nullptr);
}

TEST_F(EvalBase, AnUnfinishedOneLeavesNothing) {
    {
        BaseWriter writer(path_, "a key", kVocabulary, kRows);
        std::vector<uint16_t> stored(kVocabulary);
        writer.add(make_base_row(logits_[0].data(), kVocabulary, 5, stored.data()));
    }
    EXPECT_TRUE(fs::is_empty(folder_));
    EXPECT_THROW(BaseWriter(folder_ / "no such folder" / "base.bin", "a key", kVocabulary, kRows), Error);
}

TEST_F(EvalBase, FilesAreToldApart) {
    const auto write_file = [&](const std::string& text) {
        std::ofstream(path_) << text;
        fs::last_write_time(path_, fs::file_time_type::clock::time_point{});
        return file_identity(path_.string());
    };
    const std::string long_text(300000, 'x');
    std::string changed = long_text;
    changed[123456] = 'y';
    EXPECT_EQ(write_file(long_text), write_file(long_text));
    EXPECT_NE(write_file(long_text), write_file(changed));
    EXPECT_NE(write_file("one"), write_file("two"));
    EXPECT_THROW(file_identity((folder_ / "none").string()), Error);
    EXPECT_NE(hash_bytes("abc", 3), hash_bytes("abc\0", 4));
}

// ---- needles -------------------------------------------------------------------------------------------------------

std::string prose(size_t sentences) {
    std::string text;
    for (size_t i = 0; i < sentences; ++i) {
        text += "Sentence number " + std::to_string(i) + " has e.g. version 3.14 of words in it. ";
    }
    return text;
}

TEST(Needles, LieAtTheirDepthsBetweenSentences) {
    const std::string text = prose(200);
    const Haystack haystack = make_haystacks(NeedleVariant::multikey, even_depths(11), 3).front();
    const std::string placed = place_needles(text, haystack.needles);
    std::string rest = placed;
    for (const Needle& needle : haystack.needles) {
        const size_t at = placed.find(needle.sentence());
        ASSERT_NE(at, std::string::npos);
        EXPECT_EQ(placed.find(needle.sentence(), at + 1), std::string::npos);
        EXPECT_NEAR(static_cast<double>(at) / static_cast<double>(placed.size()), needle.depth, 0.06);
        EXPECT_TRUE(at == 0 || placed.substr(at - 2, 2) == ". ") << placed.substr(at < 20 ? 0 : at - 20, 20);
        rest.erase(rest.find(needle.sentence()), needle.sentence().size() + 1);
    }
    EXPECT_EQ(rest, text); // nothing else has changed
}

TEST(Needles, Variants) {
    const std::vector<double> depths = even_depths(11);
    EXPECT_DOUBLE_EQ(depths[1], 0.1);
    const auto single = make_haystacks(NeedleVariant::single, depths, 1);
    ASSERT_EQ(single.size(), 11U);
    EXPECT_EQ(single[4].needles.size(), 1U);
    EXPECT_DOUBLE_EQ(single[4].needles[0].depth, 0.4);

    const auto keys = make_haystacks(NeedleVariant::multikey, depths, 1);
    ASSERT_EQ(keys.size(), 1U);
    std::set<std::string> cities;
    std::set<std::string> numbers;
    for (const Needle& needle : keys[0].needles) {
        cities.insert(needle.city);
        numbers.insert(needle.number);
        EXPECT_EQ(needle.number.size(), 7U);
        EXPECT_NE(needle.number[0], '0');
    }
    EXPECT_EQ(cities.size(), 11U);
    EXPECT_EQ(numbers.size(), 11U);
    EXPECT_EQ(keys[0].questions.size(), 11U);

    const auto values = make_haystacks(NeedleVariant::multivalue, depths, 1);
    ASSERT_EQ(values[0].questions.size(), 3U); // 4 + 4 + 3 numbers
    std::set<size_t> asked;
    for (const NeedleQuestion& question : values[0].questions) {
        EXPECT_LE(question.asked.size(), 4U);
        for (const size_t i : question.asked) {
            EXPECT_EQ(values[0].needles[i].city, values[0].needles[question.asked[0]].city);
            EXPECT_NE(question.answer.find(values[0].needles[i].number), std::string::npos);
            asked.insert(i);
        }
    }
    EXPECT_EQ(asked.size(), 11U);

    EXPECT_EQ(make_haystacks(NeedleVariant::multikey, depths, 1)[0].needles[3].number, keys[0].needles[3].number);
    EXPECT_NE(make_haystacks(NeedleVariant::multikey, depths, 2)[0].needles[3].number, keys[0].needles[3].number);
}

TEST(Needles, AnswersAreWholeNumbers) {
    EXPECT_TRUE(answer_has(" 1234567.", "1234567", true));
    EXPECT_TRUE(answer_has(": **1234567**", "1234567", true));
    EXPECT_FALSE(answer_has(" 12345678", "1234567", true));
    EXPECT_FALSE(answer_has(" 91234567", "1234567", false));
    EXPECT_FALSE(answer_has(" 7654321, no, 1234567", "1234567", true));
    EXPECT_TRUE(answer_has(" 7654321, 1234567", "1234567", false));
    EXPECT_FALSE(answer_has("", "1234567", false));
}

} // namespace
