// Synthetic models in libllama, and depths that are reached by tiling a prefilled state: every copy is attended to.
#include "llm/depth_context.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/plan.h"
#include "llm/synthetic_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <unistd.h>

namespace {

using namespace turboquant::llm;
namespace fs = std::filesystem;

// As the real ones in everything but size.
const SyntheticShape kTiny = {"tiny", "llama", 2, 256, 4, 2, 64, 256, 320, 10000.0F, ""};
const SyntheticShape kTinyQwen = {"tiny-qwen", "qwen3", 2, 256, 4, 2, 128, 256, 320, 10000.0F, ""};

class Synthetic : public testing::Test {
protected:
    static void SetUpTestSuite() {
        folder_ = fs::temp_directory_path() / ("tq_bench_test_" + std::to_string(::getpid()));
        fs::create_directories(folder_);
        ::setenv("XDG_CACHE_HOME", folder_.c_str(), 1);
        install_log(false);
        llama_backend_init();
    }
    static void TearDownTestSuite() { fs::remove_all(folder_); }
    static fs::path folder_;
};
fs::path Synthetic::folder_;

std::vector<char> contents(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

TEST_F(Synthetic, LoadsInLibllamaWithTheShapeThatWasAsked) {
    for (const SyntheticShape& shape : {kTiny, kTinyQwen}) {
        const std::string path = synthetic_model(shape, {});
        const ModelPlan plan(path);
        EXPECT_EQ(plan.architecture, shape.architecture);
        EXPECT_EQ(plan.layers, shape.layers);
        EXPECT_EQ(plan.heads, shape.heads);
        const CachePlan cache = plan.plan(1024);
        ASSERT_EQ(cache.layers.size(), static_cast<size_t>(shape.layers));
        EXPECT_EQ(cache.layers[0].kv_heads, shape.kv_heads);
        EXPECT_EQ(cache.layers[0].key_size, shape.head_size);
        EXPECT_EQ(cache.layers[0].value_size, shape.head_size);
        const Model model = Model::load(path, false, {});
        EXPECT_EQ(llama_vocab_n_tokens(model.vocab()), shape.vocabulary);
        EXPECT_GT(model.tokenize("any text: \xc3\xa9", true).size(), 10U);
        EXPECT_GE(model.trained_context(), 131072);
    }
}

TEST_F(Synthetic, IsTheSameFileAgainAndReused) {
    const fs::path path = synthetic_model(kTiny, {});
    const std::vector<char> first = contents(path);
    fs::remove(path);
    EXPECT_EQ(synthetic_model(kTiny, {}), path);
    EXPECT_TRUE(contents(path) == first);
    const auto written = fs::last_write_time(path);
    EXPECT_EQ(synthetic_model(kTiny, {}), path);
    EXPECT_EQ(fs::last_write_time(path), written);
    // Nothing half-written stays.
    for (const auto& entry : fs::directory_iterator(path.parent_path())) {
        EXPECT_EQ(entry.path().extension(), ".gguf");
    }
}

TEST_F(Synthetic, ShapesByName) {
    EXPECT_EQ(find_synthetic_shape("hd128-8l").kv_heads, 2);
    EXPECT_EQ(find_synthetic_shape("llama-1b").head_size, 64);
    EXPECT_EQ(find_synthetic_shape("qwen3-0.6b").layers, 28);
    EXPECT_THROW(find_synthetic_shape("gpt-5"), UsageError);
}

DepthOptions options_for(const char* kv, int64_t tile) {
    DepthOptions options;
    options.kv = parse_kv(kv);
    options.kv.window = 0;
    options.kv.sinks = 0;
    options.kv.calibrate = false;
    options.head_size = "64";
    options.capacity = 512;
    options.tile = tile;
    options.threads = 1;
    return options;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    }
    return std::sqrt(sum / static_cast<double>(a.size()));
}

// A tile of two tokens: among n copies of it the next token's own row has a part s / (n + s) of its attention, so that each
// doubling of the copies moves the scores, in the end by less and less. Copies that are not seen would move nothing.
TEST_F(Synthetic, TiledDepthsAttendToEveryCopy) {
    const std::string path = synthetic_model(kTiny, {});
    for (const char* kv : {"f16", "q8_0", "16/16", "8/8", "4/4"}) {
        const DepthOptions options = options_for(kv, 2);
        const Model model = Model::load(path, options.kv.turboquant(), {});
        DepthContext context(model, options);
        std::vector<float> last;
        std::vector<double> moved; // by each doubling, relative to the scores
        for (int64_t depth = 2; depth <= 256; depth *= 2) {
            context.fill(depth, {});
            EXPECT_EQ(context.depth(), depth);
            EXPECT_EQ(context.copies(), depth / 2);
            const float* row = context.scores(7);
            const std::vector<float> scores(row, row + kTiny.vocabulary);
            if (!last.empty()) {
                moved.push_back(distance(scores, last) / distance(scores, std::vector<float>(scores.size())));
            }
            last = scores;
        }
        for (const double share : moved) {
            EXPECT_GT(share, 0.001) << kv << ": copies that are not attended to";
        }
        EXPECT_LT(moved.back(), *std::max_element(moved.begin(), moved.end())) << kv;
    }
}

// The same prefix, read or tiled once: nothing but the copies differs.
TEST_F(Synthetic, OneTileIsTheRealThing) {
    const std::string path = synthetic_model(kTiny, {});
    for (const char* kv : {"f16", "4/4"}) {
        const DepthOptions tiled = options_for(kv, 64);
        const DepthOptions real = options_for(kv, 0);
        const Model model = Model::load(path, tiled.kv.turboquant(), {});
        DepthContext a(model, tiled);
        DepthContext b(model, real);
        a.fill(64, {});
        b.fill(64, {});
        const float* row = a.scores(7);
        const std::vector<float> scores(row, row + kTiny.vocabulary);
        row = b.scores(7);
        EXPECT_EQ(scores, std::vector<float>(row, row + kTiny.vocabulary)) << kv;
        b.fill(300, {});
        EXPECT_EQ(b.copies(), 1);
        a.fill(300, {}); // four tiles and a rest that is read
        EXPECT_EQ(a.copies(), 4);
        EXPECT_EQ(a.depth(), 300);
        EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(a.get()), 0), 64 + 300 - 256 - 1);
        EXPECT_GT(a.decode(2), 0);
        EXPECT_GT(a.read(20), 0);
        // What was measured is gone again.
        EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(a.get()), 0), 64 + 300 - 256 - 1);
        EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(b.get()), 0), 299);
    }
}

TEST_F(Synthetic, RefusesWhatDoesNotFit) {
    const Model model = Model::load(synthetic_model(kTiny, {}), false, {});
    DepthContext context(model, options_for("f16", 2));
    EXPECT_THROW(context.fill(513, {}), Error);
}

} // namespace
