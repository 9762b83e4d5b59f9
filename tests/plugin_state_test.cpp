// Saving and restoring: the host sees the cache as bytes of f16 rows, and what comes back must be the very same cache.
#include "plugin_host.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <unistd.h>

namespace tqtest {
namespace {

const Cache kCaches[] = {{"4/4"},       {"4/4", 32, 4}, {"5/4", 32, 4}, {"8/8", 8, 0},
                         {"3/3", 0, 4}, {"2/6", 16, 2}, {"16/16"}};

std::string describe(const Cache& cache) {
    return cache.kv + " window " + std::to_string(cache.window) + " sinks " + std::to_string(cache.sinks);
}

class State : public testing::Test {
protected:
    void SetUp() override {
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
        model = load_tiny("llama_64", Host::plugin);
        ASSERT_TRUE(model);
        vocabulary = vocabulary_of(model.get());
        prompt = random_tokens(150, vocabulary, 21);
        tail = random_tokens(50, vocabulary, 22);
        n = static_cast<llama_pos>(prompt.size());
    }

    Context context(const Cache& cache, const Shape& shape = {}) { return make_context(model.get(), shape, cache); }

    Model model;
    int vocabulary = 0;
    Tokens prompt;
    Tokens tail;
    llama_pos n = 0;
};

// What each way of restoring must give: the logits of a context that was never saved, bit for bit.
TEST_F(State, ContinuesBitForBit) {
    for (const Cache& cache : kCaches) {
        SCOPED_TRACE(describe(cache));
        const Context original = context(cache);
        ASSERT_TRUE(original);
        decode(original.get(), prompt, {.chunk = 60});
        const std::vector<uint8_t> whole = whole_state(original.get());
        const std::vector<uint8_t> sequence = sequence_state(original.get(), 0);
        const Logits expected = decode(original.get(), tail, {.begin = n, .chunk = 7});
        ASSERT_FALSE(expected.empty());

        const Context fresh = context(cache);
        ASSERT_NE(llama_state_set_data(fresh.get(), whole.data(), whole.size()), 0u);
        EXPECT_TRUE(decode(fresh.get(), tail, {.begin = n, .chunk = 7}) == expected) << "whole state, new context";

        const Context other = context(cache);
        ASSERT_TRUE(restore_sequence(other.get(), 0, sequence));
        EXPECT_TRUE(decode(other.get(), tail, {.begin = n, .chunk = 7}) == expected) << "sequence, new context";

        // Into a context that has been used for something else.
        llama_memory_clear(llama_get_memory(other.get()), true);
        decode(other.get(), tail, {.chunk = 9});
        llama_memory_clear(llama_get_memory(other.get()), false);
        ASSERT_TRUE(restore_sequence(other.get(), 0, sequence));
        EXPECT_TRUE(decode(other.get(), tail, {.begin = n, .chunk = 7}) == expected) << "sequence, used context";

        // Back into the context it came from, which has gone on since.
        ASSERT_NE(llama_state_set_data(original.get(), whole.data(), whole.size()), 0u);
        EXPECT_TRUE(decode(original.get(), tail, {.begin = n, .chunk = 7}) == expected) << "whole state, same context";
    }
}

TEST_F(State, SavingTwiceGivesTheSameBytes) {
    for (const Cache& cache : kCaches) {
        SCOPED_TRACE(describe(cache));
        const Context original = context(cache);
        decode(original.get(), prompt, {.chunk = 60});
        const std::vector<uint8_t> first = sequence_state(original.get(), 0);
        EXPECT_EQ(sequence_state(original.get(), 0), first) << "reading changes nothing";
        const Context fresh = context(cache);
        ASSERT_TRUE(restore_sequence(fresh.get(), 0, first));
        EXPECT_EQ(sequence_state(fresh.get(), 0), first) << "saved, restored, saved";
    }
}

TEST_F(State, ThroughFiles) {
    const std::filesystem::path folder =
        std::filesystem::temp_directory_path() / ("tq_state_" + std::to_string(getpid()));
    std::filesystem::create_directories(folder);
    const Cache cache{"4/4", 32, 4};
    const Context original = context(cache);
    decode(original.get(), prompt);
    const std::string session = folder / "session.bin";
    const std::string slot = folder / "slot.bin";
    ASSERT_TRUE(llama_state_save_file(original.get(), session.c_str(), prompt.data(), prompt.size()));
    ASSERT_NE(llama_state_seq_save_file(original.get(), slot.c_str(), 0, prompt.data(), prompt.size()), 0u);
    const Logits expected = decode(original.get(), tail, {.begin = n});

    Tokens tokens(prompt.size());
    size_t count = 0;
    const Context a = context(cache);
    ASSERT_TRUE(llama_state_load_file(a.get(), session.c_str(), tokens.data(), tokens.size(), &count));
    EXPECT_EQ(tokens, prompt);
    EXPECT_TRUE(decode(a.get(), tail, {.begin = n}) == expected);
    const Context b = context(cache);
    ASSERT_NE(llama_state_seq_load_file(b.get(), slot.c_str(), 0, tokens.data(), tokens.size(), &count), 0u);
    EXPECT_TRUE(decode(b.get(), tail, {.begin = n}) == expected);
    std::filesystem::remove_all(folder);
}

// A server's slots: one of four sequences is saved, dropped, and restored while the others stay.
TEST_F(State, OneOfSeveralSequences) {
    for (const bool unified : {false, true}) {
        for (const Cache& cache : {Cache{"4/4"}, Cache{"4/4", 16, 4}}) {
            SCOPED_TRACE(describe(cache) + (unified ? " unified" : " streams"));
            const Context c = context(cache, {.n_ctx = 2048, .n_seq_max = 4, .unified = unified});
            ASSERT_TRUE(c);
            std::vector<Tokens> prompts;
            for (uint32_t s = 0; s < 4; ++s) {
                prompts.push_back(random_tokens(80, vocabulary, 30 + s));
            }
            decode_together(c.get(), prompts, 20);
            const std::vector<uint8_t> saved = sequence_state(c.get(), 2);
            const std::vector<uint8_t> neighbour = sequence_state(c.get(), 1);
            const Logits expected = decode(c.get(), tail, {.sequence = 2, .begin = 80});
            ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(c.get()), 2, -1, -1));
            ASSERT_TRUE(restore_sequence(c.get(), 2, saved));
            if (cache.window == 0) { // exact rows come back younger, and their ages are part of what is saved
                EXPECT_EQ(sequence_state(c.get(), 2), saved);
            }
            const Difference d = compare(decode(c.get(), tail, {.sequence = 2, .begin = 80}), expected, vocabulary);
            if (!unified) {
                EXPECT_EQ(d.relative, 0);
                EXPECT_EQ(sequence_state(c.get(), 1), neighbour);
            } else {
                // Other rows share the ring, so some that were exact no longer are.
                EXPECT_LE(d.relative, cache.window > 0 ? 0.3 : 1e-6);
            }
        }
    }
}

TEST_F(State, StockStateIsAccepted) {
    const Model stock = load_tiny("llama_64", Host::stock);
    const Context source = make_context(stock.get(), {}, {});
    decode(source.get(), prompt);
    const std::vector<uint8_t> state = sequence_state(source.get(), 0);
    const Logits expected = decode(source.get(), tail, {.begin = n});
    struct {
        Cache cache;
        double limit;
    } const cases[] = {{{"16/16"}, 2e-3}, {{"8/8"}, 0.02}, {{"8/8", 32, 4}, 0.02}, {{"4/4"}, 0.3}};
    for (const auto& [cache, limit] : cases) {
        SCOPED_TRACE(describe(cache));
        const Context c = context(cache);
        ASSERT_TRUE(restore_sequence(c.get(), 0, state));
        EXPECT_LE(compare(decode(c.get(), tail, {.begin = n}), expected, vocabulary).relative, limit);
    }
}

// Rows saved at other settings, or damaged, are refused: by the restore, or by the decode after it. Never a crash, and
// never a silent answer from wrong rows. The context works again once it is cleared.
TEST_F(State, ForeignAndDamagedStatesAreRefused) {
    const Cache cache{"4/4", 32, 4};
    const Context source = context(cache);
    decode(source.get(), prompt);
    const std::vector<uint8_t> good = sequence_state(source.get(), 0);
    const Logits expected = decode(source.get(), tail, {.begin = n});

    auto refused = [&](const Context& c, const std::vector<uint8_t>& state) {
        const bool restored = restore_sequence(c.get(), 0, state);
        const bool no = !restored || decode(c.get(), tail, {.begin = n}).empty();
        llama_memory_clear(llama_get_memory(c.get()), true);
        EXPECT_FALSE(decode(c.get(), prompt).empty()) << "usable again after clear";
        llama_memory_clear(llama_get_memory(c.get()), true);
        return no;
    };
    for (const Cache& other : {Cache{"8/8"}, Cache{"5/4", 32, 4}, Cache{"4/5", 32, 4}}) {
        const Context c = context(other);
        EXPECT_TRUE(refused(c, good)) << "rows of 4/4 in a cache of " << other.kv;
    }
    const Context c = context(cache);
    for (const size_t size : {size_t{0}, size_t{5}, good.size() / 3, good.size() - 1}) {
        EXPECT_TRUE(refused(c, {good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)})) << "cut to " << size;
    }
    StateMap map;
    ASSERT_TRUE(map_state(good, map));
    const StateRows& keys = map.keys[0];
    for (const size_t row : {size_t{60}, size_t{149}}) { // 60: codes; 149: exact
        // The header of a native row says what it is; half a header is no row at all and must not pass for f16 values.
        for (const size_t byte : {size_t{4}, size_t{5}, size_t{6}, size_t{7}}) {
            std::vector<uint8_t> bad = good;
            bad[keys.offset + row * keys.row_bytes + byte] ^= 0x5a;
            const bool restored = restore_sequence(c.get(), 0, bad);
            const Logits after = restored ? decode(c.get(), tail, {.begin = n}) : Logits();
            EXPECT_TRUE(after.empty() || all_finite(after)) << "row " << row << " byte " << byte;
            llama_memory_clear(llama_get_memory(c.get()), true);
        }
    }
    ASSERT_TRUE(restore_sequence(c.get(), 0, good));
    EXPECT_TRUE(decode(c.get(), tail, {.begin = n}) == expected) << "the good state still restores";
}

// Checkpoints kept on the device (llama-server takes them of sliding-window and hybrid models).
TEST_F(State, OnDeviceCheckpoint) {
    for (const Cache& cache : {Cache{"16/16"}, Cache{"4/4", 32, 4}}) {
        SCOPED_TRACE(describe(cache));
        const Context c = context(cache);
        decode(c.get(), prompt);
        const llama_state_seq_flags flags = LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;
        std::vector<uint8_t> state(llama_state_seq_get_size_ext(c.get(), 0, flags));
        ASSERT_FALSE(state.empty());
        ASSERT_EQ(llama_state_seq_get_data_ext(c.get(), state.data(), state.size(), 0, flags), state.size());
        const Logits expected = decode(c.get(), tail, {.begin = n});
        ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(c.get()), 0, -1, -1));
        ASSERT_NE(llama_state_seq_set_data_ext(c.get(), state.data(), state.size(), 0, flags), 0u);
        EXPECT_TRUE(decode(c.get(), tail, {.begin = n}) == expected);
    }
}

// Sliding-window and hybrid caches have states of their own shape.
TEST_F(State, EveryKindOfCache) {
    for (const char* name : {"gemma3", "gemma4", "gpt_oss", "jamba", "mamba", "deepseek2_mla", "deci", "bloom"}) {
        const Model other = load_tiny(name, Host::plugin);
        ASSERT_TRUE(other);
        for (const bool full : {true, false}) {
            for (const Cache& cache : {Cache{"4/4"}, Cache{"4/4", 16, 4}}) {
                SCOPED_TRACE(std::string(name) + " " + describe(cache) + (full ? " full" : " sliding"));
                const Shape shape{.n_ubatch = 64, .swa_full = full};
                const Context original = make_context(other.get(), shape, cache);
                ASSERT_TRUE(original);
                decode(original.get(), prompt, {.chunk = 30});
                const std::vector<uint8_t> whole = whole_state(original.get());
                const Logits expected = decode(original.get(), tail, {.begin = n, .chunk = 10});
                const Context fresh = make_context(other.get(), shape, cache);
                ASSERT_NE(llama_state_set_data(fresh.get(), whole.data(), whole.size()), 0u);
                const Logits got = decode(fresh.get(), tail, {.begin = n, .chunk = 10});
                if (llama_model_n_swa(other.get()) == 0) {
                    EXPECT_TRUE(got == expected);
                } else {
                    // After a restore the host puts new tokens into other cells (those outside the window), stock or
                    // not: sums run in another order, and now and then a code flips.
                    EXPECT_LE(compare(got, expected, vocabulary).relative, 0.03);
                }
            }
        }
    }
}

} // namespace
} // namespace tqtest
