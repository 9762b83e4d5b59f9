// Every kind of KV cache that llama.cpp builds, teacher-forced on tiny random models: the plug-in's pass-through store
// against the stock f16 cache, and compressed caches in order of their bits. What "equal" means is measured on the stock
// host itself: the difference between its own ways of batching the same tokens.
#include "plugin_host.h"

#include <algorithm>
#include <cstdio>
#include <ostream>

namespace tqtest {
namespace {

struct Case {
    const char* name;
    bool has_cache = true;
    // Layers that read the rows of earlier layers come after the batch has left the ring: they see exact only what is in
    // it then, and so depend on how the prompt was cut.
    bool shares_rows = false;
};

// Relative error of the logits at 8/8; measured on all models, times two.
constexpr double kLimit8 = 0.025;

void PrintTo(const Case& c, std::ostream* out) {
    *out << c.name;
}

constexpr Case kCases[] = {
    {"llama_64"}, {"llama_80"},           {"llama_96"},      {"llama_128"}, {"llama_group16"}, {"gemma2"},
    {"gemma3"},   {"gemma4", true, true}, {"qwen2"},         {"qwen3"},     {"jamba"},         {"mamba", false},
    {"bloom"},    {"deepseek2_mla"},      {"deepseek2_mha"}, {"gpt_oss"},   {"deci"},
};

constexpr int kTokens = 200;
constexpr int kChunks[] = {0, 37, 1};

class TinyModel : public testing::TestWithParam<Case> {
protected:
    void SetUp() override {
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
        plugin = load_tiny(GetParam().name, Host::plugin);
        stock = load_tiny(GetParam().name, Host::stock);
        ASSERT_TRUE(plugin && stock);
        vocabulary = vocabulary_of(stock.get());
        tokens = random_tokens(kTokens, vocabulary, 7);
    }

    Logits run(llama_model* model, const Cache& cache, int chunk, const Shape& shape = {}) {
        const Context context = make_context(model, shape, cache);
        EXPECT_TRUE(context);
        return context ? decode(context.get(), tokens, {.chunk = chunk}) : Logits();
    }

    Difference against(const Logits& a, const Logits& b) { return compare(a, b, vocabulary); }

    Model plugin;
    Model stock;
    int vocabulary = 0;
    Tokens tokens;
};

TEST_P(TinyModel, PassThroughEqualsTheStockCache) {
    const Logits reference = run(stock.get(), {}, 0);
    double noise = 1e-6;
    for (const int chunk : kChunks) {
        noise = std::max(noise, against(run(stock.get(), {}, chunk), reference).relative);
    }
    for (const int chunk : kChunks) {
        const Difference d = against(run(plugin.get(), {"16/16"}, chunk), reference);
        std::printf("%s chunk %d: pass-through %.2e, the host's own batchings %.2e\n", GetParam().name, chunk,
                    d.relative, noise);
        EXPECT_LE(d.relative, noise) << "chunk " << chunk;
        EXPECT_LE(d.mean_kld, 5e-6) << "chunk " << chunk;
    }
}

TEST_P(TinyModel, BitsOrderTheError) {
    const Logits reference = run(stock.get(), {}, 0);
    double last = 0;
    for (const char* kv : {"8/8", "6/6", "4/4", "2/2"}) {
        // Until a cache has calibrated its rows are exact, and when that is depends on how the prompt is cut.
        const Cache cache{.kv = kv, .calibrate = false};
        const Difference whole = against(run(plugin.get(), cache, 0), reference);
        const Difference single = against(run(plugin.get(), cache, 1), reference);
        std::printf("%s %s: relative error %.4f in one batch, %.4f token by token\n", GetParam().name, kv,
                    whole.relative, single.relative);
        if (!GetParam().has_cache) {
            EXPECT_LE(whole.relative, 1e-5);
            continue;
        }
        // A quarter more tokens in error is nothing the codec does: both ways of feeding must agree on how wrong it is.
        EXPECT_NEAR(single.relative, whole.relative, 0.25 * whole.relative + 1e-3);
        EXPECT_GT(whole.relative, 1.3 * last);
        if (std::string(kv) == "8/8") {
            EXPECT_LE(whole.relative, kLimit8);
        }
        last = whole.relative;
    }
}

// With every row exact, two bits must be as good as none at all: it is the exact rows that attention takes.
TEST_P(TinyModel, ExactRowsHideTheCodes) {
    if (!GetParam().has_cache) {
        GTEST_SKIP() << "no KV cache";
    }
    const Logits reference = run(plugin.get(), {"16/16"}, 0);
    for (const Cache& cache : {Cache{"2/2", 256, 0}, Cache{"2/2", 0, 256}}) {
        for (const int chunk : kChunks) {
            const Difference d = against(run(plugin.get(), cache, chunk), reference);
            EXPECT_LE(d.relative, 1e-3) << "window " << cache.window << " sinks " << cache.sinks << " chunk " << chunk;
        }
    }
}

// Which rows are exact for a query depends on its place in the sequence, not on how the prompt was cut into batches.
TEST_P(TinyModel, WindowFollowsTheQuery) {
    if (!GetParam().has_cache) {
        GTEST_SKIP() << "no KV cache";
    }
    const Cache cache{.kv = "3/3", .window = 16, .sinks = 4, .calibrate = false};
    const Logits single = run(plugin.get(), cache, 1);
    const Difference none = against(run(plugin.get(), {.kv = "3/3", .calibrate = false}, 1), single);
    for (const int chunk : {0, 37, 5}) {
        const Difference d = against(run(plugin.get(), cache, chunk), single);
        std::printf("%s chunk %d: %.2e (without window and sinks: %.2e)\n", GetParam().name, chunk, d.relative,
                    none.relative);
        EXPECT_LE(d.relative, (GetParam().shares_rows ? 1.0 : 0.15) * none.relative) << "chunk " << chunk;
    }
}

INSTANTIATE_TEST_SUITE_P(All, TinyModel, testing::ValuesIn(kCases),
                         [](const testing::TestParamInfo<Case>& p) { return std::string(p.param.name); });

class Threads : public testing::TestWithParam<const char*> {};

TEST_P(Threads, Agree) {
    TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
    const Model model = load_tiny(GetParam(), Host::plugin);
    ASSERT_TRUE(model);
    const Tokens tokens = random_tokens(120, vocabulary_of(model.get()), 13);
    auto run = [&](int threads, int chunk) {
        const Context context = make_context(model.get(), {.threads = threads}, {"4/4", 16, 4});
        return decode(context.get(), tokens, {.chunk = chunk});
    };
    for (const int chunk : {0, 10}) {
        EXPECT_LE(compare(run(2, chunk), run(1, chunk), vocabulary_of(model.get())).relative, 0.02)
            << "chunk " << chunk;
    }
}

INSTANTIATE_TEST_SUITE_P(All, Threads, testing::Values("llama_group16", "gemma3", "deepseek2_mla", "gpt_oss"),
                         [](const testing::TestParamInfo<const char*>& p) { return std::string(p.param); });

// Sliding-window caches of the small kind: far more tokens than cells, so that rows are used again and again.
class SlidingModel : public testing::TestWithParam<const char*> {};

TEST_P(SlidingModel, RowsAreReusedWhenTheWindowWraps) {
    TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
    const Model plugin = load_tiny(GetParam(), Host::plugin);
    const Model stock = load_tiny(GetParam(), Host::stock);
    ASSERT_TRUE(plugin && stock);
    const int vocabulary = vocabulary_of(stock.get());
    const Tokens tokens = random_tokens(600, vocabulary, 11);
    auto run = [&](llama_model* model, const Cache& cache, bool full, int chunk) {
        const Context context =
            make_context(model, {.n_ctx = 1024, .n_ubatch = static_cast<uint32_t>(chunk), .swa_full = full}, cache);
        EXPECT_TRUE(context);
        return context ? decode(context.get(), tokens, {.chunk = chunk}) : Logits();
    };
    const Logits reference = run(stock.get(), {}, false, 32);
    // The host's kernels for small and for large batches round differently.
    const double noise = std::max({compare(run(stock.get(), {}, false, 200), reference, vocabulary).relative,
                                   compare(run(stock.get(), {}, true, 600), reference, vocabulary).relative, 1e-6});
    for (const bool full : {false, true}) {
        const Difference pass = compare(run(plugin.get(), {"16/16"}, full, 32), reference, vocabulary);
        const Difference eight = compare(run(plugin.get(), {"8/8", 8, 4}, full, 32), reference, vocabulary);
        std::printf("%s swa_full %d: pass-through %.2e (noise %.2e), 8/8 %.4f\n", GetParam(), full, pass.relative,
                    noise, eight.relative);
        EXPECT_LE(pass.relative, 2 * noise) << "swa_full " << full;
        EXPECT_LE(eight.relative, 0.03) << "swa_full " << full;
    }
}

INSTANTIATE_TEST_SUITE_P(All, SlidingModel, testing::Values("gemma2", "gemma3", "gemma4", "gpt_oss"),
                         [](const testing::TestParamInfo<const char*>& p) { return std::string(p.param); });

} // namespace
} // namespace tqtest
