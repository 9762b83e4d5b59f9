// Several sequences in one cache, rows removed, copied and shifted: what servers do with the KV cache all day.
#include "plugin_host.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

namespace tqtest {
namespace {

class Sequences : public testing::Test {
protected:
    void SetUp() override {
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
        plugin = load_tiny("llama_64", Host::plugin);
        stock = load_tiny("llama_64", Host::stock);
        ASSERT_TRUE(plugin && stock);
        vocabulary = vocabulary_of(stock.get());
        for (uint32_t s = 0; s < 4; ++s) {
            prompts.push_back(random_tokens(60 + 23 * static_cast<int>(s), vocabulary, 100 + s));
        }
    }

    Logits alone(llama_model* model, const Tokens& tokens, const Cache& cache) {
        const Context context = make_context(model, {}, cache);
        return context ? decode(context.get(), tokens) : Logits();
    }

    Difference against(const Logits& a, const Logits& b) { return compare(a, b, vocabulary); }

    Model plugin;
    Model stock;
    int vocabulary = 0;
    std::vector<Tokens> prompts;
};

// Calibrating caches would differ: four sequences together have seen 128 rows sooner than one alone.
TEST_F(Sequences, TogetherAsAlone) {
    for (const bool unified : {false, true}) {
        for (const int per_batch : {1, 13}) {
            for (Cache cache : {Cache{"16/16"}, Cache{"8/8"}, Cache{"4/4"}, Cache{"4/4", 8, 4}}) {
                cache.calibrate = false;
                const Context context =
                    make_context(plugin.get(), {.n_ctx = 1024, .n_seq_max = 4, .unified = unified}, cache);
                ASSERT_TRUE(context);
                const std::vector<Logits> together = decode_together(context.get(), prompts, per_batch);
                ASSERT_EQ(together.size(), prompts.size());
                // A ring shared by four sequences keeps fewer rows of each exact: only the codec's own error is promised.
                const double limit = cache.window > 0 && unified ? 0.2 : cache.kv == "4/4" ? 0.02 : 2e-3;
                for (size_t s = 0; s < prompts.size(); ++s) {
                    const Difference d = against(together[s], alone(plugin.get(), prompts[s], cache));
                    EXPECT_LE(d.relative, limit) << cache.kv << " window " << cache.window << " sequence " << s
                                                 << " unified " << unified << " per batch " << per_batch;
                }
            }
        }
    }
}

// All rows are among their sequence's first `sinks`, so even 2 bits must be exact, whoever shares the stream.
TEST_F(Sequences, SinksAreEachSequencesOwn) {
    std::vector<Tokens> starts;
    for (const Tokens& p : prompts) {
        starts.emplace_back(p.begin(), p.begin() + 24);
    }
    for (const bool unified : {false, true}) {
        for (const int per_batch : {1, 5, 24}) {
            auto error = [&](int sinks) {
                const Context context = make_context(plugin.get(), {.n_ctx = 1024, .n_seq_max = 4, .unified = unified},
                                                     {"2/2", 0, sinks, 4});
                EXPECT_TRUE(context);
                const std::vector<Logits> got = decode_together(context.get(), starts, per_batch);
                double worst = 0;
                for (size_t s = 0; s < starts.size(); ++s) {
                    worst = std::max(worst, against(got[s], alone(plugin.get(), starts[s], {"16/16"})).relative);
                }
                return worst;
            };
            EXPECT_LE(error(24), 1e-3) << "unified " << unified << " per batch " << per_batch;
            EXPECT_GT(error(0), 0.05) << "the codes alone should show";
        }
    }
}

TEST_F(Sequences, RemovedTokensAreForgotten) {
    const Tokens& kept = prompts[0];
    const Tokens tail = random_tokens(40, vocabulary, 5);
    for (const Cache& cache : {Cache{"16/16"}, Cache{"8/8"}, Cache{"8/8", 16, 4}}) {
        const Context context = make_context(plugin.get(), {}, cache);
        ASSERT_TRUE(context);
        const auto n = static_cast<llama_pos>(kept.size());
        decode(context.get(), kept);
        decode(context.get(), random_tokens(30, vocabulary, 9), {.begin = n});
        ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(context.get()), 0, n, -1));
        const Logits after = decode(context.get(), tail, {.begin = n});

        const Context fresh = make_context(plugin.get(), {}, cache);
        decode(fresh.get(), kept);
        const Difference d = against(after, decode(fresh.get(), tail, {.begin = n}));
        EXPECT_LE(d.relative, cache.window > 0 ? 0.02 : 1e-4) << cache.kv << " window " << cache.window;
    }
}

TEST_F(Sequences, ClearLeavesNothing) {
    for (Cache cache : {Cache{"4/4"}, Cache{"4/4", 32, 4}}) {
        for (const bool calibrate : {false, true}) {
            cache.calibrate = calibrate;
            const Context context = make_context(plugin.get(), {}, cache);
            ASSERT_TRUE(context);
            if (calibrate) { // what it learns stays with the cache
                decode(context.get(), random_tokens(150, vocabulary, 77));
                llama_memory_clear(llama_get_memory(context.get()), true);
            }
            const Logits first = decode(context.get(), prompts[1]);
            decode(context.get(), prompts[2], {.begin = static_cast<llama_pos>(prompts[1].size())});
            llama_memory_clear(llama_get_memory(context.get()), true);
            EXPECT_TRUE(decode(context.get(), prompts[1]) == first) << "window " << cache.window;
        }
    }
}

TEST_F(Sequences, CopiedStreamContinuesBitForBit) {
    const Tokens tail = random_tokens(40, vocabulary, 6);
    for (const bool unified : {false, true}) {
        for (const Cache& cache : {Cache{"16/16"}, Cache{"4/4"}, Cache{"5/4", 32, 4}, Cache{"3/3", 16, 2}}) {
            const Context context =
                make_context(plugin.get(), {.n_ctx = 1024, .n_seq_max = 2, .unified = unified}, cache);
            ASSERT_TRUE(context);
            const auto n = static_cast<llama_pos>(prompts[3].size());
            decode(context.get(), prompts[3]);
            llama_memory_seq_cp(llama_get_memory(context.get()), 0, 1, -1, -1);
            if (unified) {
                // The cells are shared; the copy must survive the original.
                const Logits before = decode(context.get(), tail, {.sequence = 1, .begin = n});
                ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(context.get()), 0, -1, -1));
                ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(context.get()), 1, n, -1));
                const Difference d = against(decode(context.get(), tail, {.sequence = 1, .begin = n}), before);
                EXPECT_LE(d.relative, cache.window > 0 ? 0.5 : 1e-4);
                continue;
            }
            const Logits copy = decode(context.get(), tail, {.sequence = 1, .begin = n});
            const Logits original = decode(context.get(), tail, {.sequence = 0, .begin = n});
            ASSERT_FALSE(copy.empty());
            EXPECT_TRUE(copy == original) << cache.kv << " window " << cache.window;
        }
    }
}

// The stock shift of the same cells is the reference. Tokens 8..24 go, the rest moves down by 16.
TEST_F(Sequences, ContextShiftAsTheHostDoesIt) {
    // Long enough for the host's kernel for large batches, whose rounding is the noise allowed.
    const Tokens tail = random_tokens(80, vocabulary, 8);
    for (const char* name : {"llama_64", "qwen2", "gemma3"}) {
        const Model shifted_plugin = load_tiny(name, Host::plugin);
        const Model shifted_stock = load_tiny(name, Host::stock);
        ASSERT_TRUE(shifted_plugin && shifted_stock);
        auto run = [&](llama_model* model, const Cache& cache, bool shift, int chunk) {
            const Context context = make_context(model, {}, cache);
            EXPECT_TRUE(context);
            const Tokens& prompt = prompts[3];
            auto n = static_cast<llama_pos>(prompt.size());
            decode(context.get(), prompt);
            if (shift) {
                llama_memory_t memory = llama_get_memory(context.get());
                EXPECT_TRUE(llama_memory_can_shift(memory));
                EXPECT_TRUE(llama_memory_seq_rm(memory, 0, 8, 24));
                llama_memory_seq_add(memory, 0, 24, -1, -16);
                n -= 16;
            }
            return decode(context.get(), tail, {.begin = n, .chunk = chunk});
        };
        const Logits reference = run(shifted_stock.get(), {}, true, 0);
        const double noise = std::max(against(run(shifted_stock.get(), {}, true, 1), reference).relative, 1e-4);
        const double unshifted = against(run(shifted_stock.get(), {}, false, 0), reference).relative;
        for (const int chunk : {0, 1}) {
            const Difference pass = against(run(shifted_plugin.get(), {"16/16"}, true, chunk), reference);
            const Difference eight = against(run(shifted_plugin.get(), {"8/8"}, true, chunk), reference);
            const Difference exact = against(run(shifted_plugin.get(), {"2/2", 256, 0}, true, chunk), reference);
            std::printf("%s chunk %d: pass-through %.2e, 8/8 %.4f, 2/2 with every row exact %.2e; noise %.2e, without "
                        "shift %.2f\n",
                        name, chunk, pass.relative, eight.relative, exact.relative, noise, unshifted);
            EXPECT_LE(pass.relative, 2 * noise) << name;
            EXPECT_LE(eight.relative, 0.02) << name;
            EXPECT_LE(exact.relative, 2 * noise) << name;
        }
        EXPECT_GT(unshifted, 0.04) << "the test would not notice a missing shift";
    }
}

TEST_F(Sequences, RowsThatDoNotMoveStayByteIdentical) {
    for (const Cache& cache : {Cache{"4/4"}, Cache{"4/4", 16, 4}, Cache{"16/16"}}) {
        const Context context = make_context(plugin.get(), {}, cache);
        ASSERT_TRUE(context);
        decode(context.get(), prompts[3]);
        llama_memory_t memory = llama_get_memory(context.get());
        ASSERT_TRUE(llama_memory_seq_rm(memory, 0, 8, 24));
        const std::vector<uint8_t> before = sequence_state(context.get(), 0);
        llama_memory_seq_add(memory, 0, 24, -1, -16);
        // The host applies a shift with the next batch; an empty removal leaves the cells as they were then.
        const auto n = static_cast<llama_pos>(prompts[3].size()) - 16;
        decode(context.get(), {1}, {.begin = n});
        ASSERT_TRUE(llama_memory_seq_rm(memory, 0, n, -1));
        const std::vector<uint8_t> after = sequence_state(context.get(), 0);

        StateMap a;
        StateMap b;
        ASSERT_TRUE(map_state(before, a) && map_state(after, b));
        ASSERT_EQ(a.positions.size(), b.positions.size());
        size_t moved = 0;
        for (size_t layer = 0; layer < a.keys.size(); ++layer) {
            for (size_t row = 0; row < a.positions.size(); ++row) {
                auto same = [&](const StateRows& x, const StateRows& y) {
                    return std::memcmp(before.data() + x.offset + row * x.row_bytes,
                                       after.data() + y.offset + row * y.row_bytes, x.row_bytes) == 0;
                };
                const bool stays = a.positions[row] == b.positions[row];
                if (cache.window == 0 || stays) {
                    EXPECT_TRUE(same(a.values[layer], b.values[layer])) << "value row " << row;
                }
                if (stays) {
                    EXPECT_TRUE(same(a.keys[layer], b.keys[layer])) << "key row " << row;
                } else if (!same(a.keys[layer], b.keys[layer])) {
                    ++moved;
                }
            }
        }
        EXPECT_GT(moved, a.keys.size() * a.positions.size() / 2) << "the shift did nothing";
    }
}

TEST_F(Sequences, TwoContextsOnTwoThreads) {
    const Cache caches[2] = {{"4/4", 16, 4}, {"8/8"}};
    Logits expected[2];
    Logits got[2];
    Context contexts[2];
    for (int i = 0; i < 2; ++i) {
        contexts[i] = make_context(plugin.get(), {.threads = 1}, caches[i]);
        ASSERT_TRUE(contexts[i]);
        decode(contexts[i].get(),
               random_tokens(150, vocabulary, 77)); // calibrated, so that later rounds meet the same cache
        llama_memory_clear(llama_get_memory(contexts[i].get()), true);
        expected[i] = decode(contexts[i].get(), prompts[3], {.chunk = 3});
        llama_memory_clear(llama_get_memory(contexts[i].get()), true);
    }
    auto work = [&](int i) {
        for (int round = 0; round < 3; ++round) {
            llama_memory_clear(llama_get_memory(contexts[i].get()), true);
            got[i] = decode(contexts[i].get(), prompts[3], {.chunk = 3});
        }
    };
    std::thread other(work, 1);
    work(0);
    other.join();
    for (int i = 0; i < 2; ++i) {
        EXPECT_TRUE(got[i] == expected[i]) << "context " << i;
    }
    // Settings are the context's own: the two differ by more than noise.
    EXPECT_GT(against(got[0], got[1]).relative, 0.01);
}

// A draft model beside its target: both have tensors cache_k_l0, cache_k_l1, ... and take turns.
TEST_F(Sequences, TwoModelsTakeTurns) {
    const Model draft = load_tiny("llama_128", Host::plugin);
    ASSERT_TRUE(draft);
    const Cache cache{"5/4", 16, 4};
    Context contexts[2] = {make_context(plugin.get(), {}, cache), make_context(draft.get(), {}, cache)};
    ASSERT_TRUE(contexts[0] && contexts[1]);
    Logits turns[2];
    for (int begin = 0; begin < 60; begin += 4) {
        const Tokens piece(prompts[0].begin() + begin, prompts[0].begin() + begin + 4);
        for (int i = 0; i < 2; ++i) {
            const Logits l = decode(contexts[i].get(), piece, {.begin = begin});
            turns[i].insert(turns[i].end(), l.begin(), l.end());
        }
    }
    llama_model* models[2] = {plugin.get(), draft.get()};
    for (int i = 0; i < 2; ++i) {
        const Context context = make_context(models[i], {}, cache);
        EXPECT_TRUE(turns[i] == decode(context.get(), prompts[0], {.chunk = 4})) << "model " << i;
    }
}

// How llama-server and others size a model before they load it: no weights, no cache, only sums.
TEST_F(Sequences, DryRunAllocatesNothing) {
    const Model dry = load_model(environment("TQ_TEST_TINY") + "/llama_memory.gguf", Host::plugin, true);
    ASSERT_TRUE(dry);
    EXPECT_TRUE(make_context(dry.get(), {.n_ctx = 8192}, {"4/4", 32, 4}));
    // And the device still works afterwards.
    const Context context = make_context(plugin.get(), {}, {"8/8"});
    ASSERT_TRUE(context);
    EXPECT_LE(against(decode(context.get(), prompts[0]), alone(stock.get(), prompts[0], {})).relative, 0.03);
}

} // namespace
} // namespace tqtest
