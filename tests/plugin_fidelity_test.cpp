// Teacher-forced on SmolLM2 with its weights as F32, where nothing but the cache differs: KL divergence against the stock
// f16 cache, next to what the stock host itself differs between its own ways of batching.
#include "plugin_host.h"
#include "plugin_text.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <unistd.h>

namespace tqtest {
namespace {

// The F32 copy, made once (540 MB). Empty if it cannot be made.
std::string full_precision_model() {
    const std::filesystem::path folder = environment("TQ_TEST_CACHE");
    const std::filesystem::path target = folder / "smollm2-f32.gguf";
    std::filesystem::create_directories(folder);
    if (!std::filesystem::exists(target)) {
        const Outcome run =
            run_program({environment("TQ_TEST_PYTHON"), environment("TQ_TEST_SCRIPTS") + "/models/make_models.py",
                         "--dequantize", environment("TQ_TEST_SMOLLM2"), target.string()},
                        {}, 100);
        EXPECT_EQ(run.status, 0) << run.err;
    }
    return std::filesystem::exists(target) ? target.string() : std::string();
}

class Fidelity : public testing::Test {
protected:
    void SetUp() override {
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_SMOLLM2");
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_PYTHON");
        const std::string path = full_precision_model();
        ASSERT_FALSE(path.empty());
        plugin = load_model(path, Host::plugin);
        stock = load_model(path, Host::stock);
        ASSERT_TRUE(plugin && stock);
        vocabulary = vocabulary_of(stock.get());
        tokens = tokenize(stock.get(), kProse, false);
        tokens.resize(std::min<size_t>(tokens.size(), 192));
    }
    Logits run(llama_model* model, const Cache& cache, int chunk) {
        const Context context = make_context(model, {.threads = 2}, cache);
        EXPECT_TRUE(context);
        return context ? decode(context.get(), tokens, {.chunk = chunk}) : Logits();
    }
    Model plugin;
    Model stock;
    int vocabulary = 0;
    Tokens tokens;
};

TEST_F(Fidelity, AgainstTheStockCache) {
    const Logits reference = run(stock.get(), {}, 0);
    const Difference batching = compare(run(stock.get(), {}, 32), reference, vocabulary);
    const Difference pass = compare(run(plugin.get(), {"16/16"}, 0), reference, vocabulary);
    const Difference pass_pieces = compare(run(plugin.get(), {"16/16"}, 32), reference, vocabulary);
    const Difference eight = compare(run(plugin.get(), {"8/8", 32, 4}, 0), reference, vocabulary);
    const Difference four = compare(run(plugin.get(), {"4/4", 32, 4}, 0), reference, vocabulary);
    std::printf("%zu tokens, mean KLD against the stock f16 cache: host between batchings %.2e, pass-through %.2e and "
                "%.2e, 8/8 %.2e, "
                "4/4 %.2e (same top token %.3f)\n",
                tokens.size(), batching.mean_kld, pass.mean_kld, pass_pieces.mean_kld, eight.mean_kld, four.mean_kld,
                four.same_top);
    EXPECT_LE(pass.mean_kld, 5e-6);
    EXPECT_LE(pass_pieces.mean_kld, 5e-6);
    // Measured: 9e-6 where the host's batchings differ by 3e-6.
    EXPECT_LE(eight.mean_kld, 5 * batching.mean_kld);
    EXPECT_LE(four.mean_kld, 0.05);
    EXPECT_GE(four.same_top, 0.9);
    EXPECT_LT(eight.mean_kld, 0.1 * four.mean_kld);
}

TEST_F(Fidelity, ParallelSequencesAgreeWithEachAlone) {
    std::vector<Tokens> parts;
    for (size_t i = 0; i + 40 <= tokens.size() && parts.size() < 4; i += 40) {
        parts.emplace_back(tokens.begin() + static_cast<std::ptrdiff_t>(i),
                           tokens.begin() + static_cast<std::ptrdiff_t>(i + 40));
    }
    // A code that flips by rounding noise in one layer moves the next layer's inputs by as much as quantising does: after
    // 30 layers two runs that differ by 1e-7 differ by the codec's own error. That, against f16, is the bound.
    std::vector<Logits> plain;
    for (const Tokens& part : parts) {
        const Context context = make_context(stock.get(), {.threads = 2}, {});
        plain.push_back(decode(context.get(), part));
    }
    for (const Cache& cache : {Cache{"16/16"}, Cache{"8/8"}}) {
        std::vector<Logits> alone;
        double own = 5e-6;
        for (size_t s = 0; s < parts.size(); ++s) {
            const Context context = make_context(plugin.get(), {.threads = 2}, cache);
            alone.push_back(decode(context.get(), parts[s]));
            own = std::max(own, compare(alone[s], plain[s], vocabulary).mean_kld);
        }
        for (const bool unified : {false, true}) {
            const Context context =
                make_context(plugin.get(), {.n_ctx = 1024, .n_seq_max = 4, .unified = unified, .threads = 2}, cache);
            ASSERT_TRUE(context);
            const std::vector<Logits> together = decode_together(context.get(), parts, 16);
            ASSERT_EQ(together.size(), parts.size());
            for (size_t s = 0; s < parts.size(); ++s) {
                const Difference d = compare(together[s], alone[s], vocabulary);
                EXPECT_LE(d.mean_kld, own) << cache.kv << " unified " << unified << " sequence " << s;
            }
        }
    }
}

} // namespace
} // namespace tqtest
