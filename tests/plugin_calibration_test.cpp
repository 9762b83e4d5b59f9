// Self-calibration: without a profile a cache's keys are conditioned by what its own first rows show. What that repairs,
// that the same start gives the same cache, and that saved rows bring their conditioning along.
#include "plugin_host.h"
#include "plugin_text.h"

#include "turboquant/store.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace tqtest {
namespace {

using turboquant::Conditioning;
using turboquant::Store;

// What the first layer's saved keys say of their conditioning.
struct Saved {
    uint32_t id = 0;       // of the rows of codes; 0 also if there are none
    int coded = 0;         // rows of codes
    bool complete = false; // they bring all of it
    Conditioning conditioning;
};

Saved saved_conditioning(const std::vector<uint8_t>& state, int bits, int head_size, int kv_heads, size_t layer = 0) {
    Saved saved;
    StateMap map;
    std::unique_ptr<Store> store;
    if (!map_state(state, map) ||
        !Store::create({.head_size = head_size, .kv_heads = kv_heads, .rows = 1}, {.bits = bits}, {}, store).ok()) {
        return saved;
    }
    const StateRows& keys = map.keys[layer];
    std::vector<std::vector<uint8_t>> pieces;
    for (size_t i = 0; i < map.positions.size(); ++i) {
        Store::NativePiece piece;
        if (!store->native_piece(state.data() + keys.offset + i * keys.row_bytes, piece)) {
            continue;
        }
        ++saved.coded;
        EXPECT_TRUE(saved.coded == 1 || saved.id == piece.conditioning_id);
        saved.id = piece.conditioning_id;
        if (piece.count > 0) {
            pieces.resize(static_cast<size_t>(piece.count));
            pieces[static_cast<size_t>(piece.index)].assign(piece.data, piece.data + piece.size);
        }
    }
    std::vector<uint8_t> record;
    for (const auto& piece : pieces) {
        if (piece.empty()) {
            return saved;
        }
        record.insert(record.end(), piece.begin(), piece.end());
    }
    saved.complete =
        turboquant::read_conditioning(record.data(), record.size(), head_size, kv_heads, saved.conditioning).ok();
    return saved;
}

double rms_difference(const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    double size = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        sum += std::pow(a[i] - b[i], 2);
        size += std::pow(b[i], 2);
    }
    return std::sqrt(sum / size);
}

Logits behind(const Logits& logits, size_t first, int vocabulary) {
    return {logits.begin() + static_cast<std::ptrdiff_t>(first * static_cast<size_t>(vocabulary)), logits.end()};
}

class Calibration : public testing::Test {
protected:
    void SetUp() override { TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY"); }
    void load(const std::string& name) {
        plugin = load_tiny(name, Host::plugin);
        stock = load_tiny(name, Host::stock);
        ASSERT_TRUE(plugin && stock);
        vocabulary = vocabulary_of(stock.get());
    }
    Context context(const Cache& cache, const Shape& shape = {}) { return make_context(plugin.get(), shape, cache); }
    // Of the rows behind the calibration, against the stock cache.
    Difference error(const Tokens& tokens, const Cache& cache, int chunk = 64) {
        const Context reference = make_context(stock.get(), {}, {});
        const Context tested = context(cache);
        EXPECT_TRUE(reference && tested);
        return compare(behind(decode(tested.get(), tokens, {.chunk = chunk}), 160, vocabulary),
                       behind(decode(reference.get(), tokens, {.chunk = chunk}), 160, vocabulary), vocabulary);
    }
    Model plugin;
    Model stock;
    int vocabulary = 0;
};

// Item 6 of the issue: offsets of 30 to 100 on keys that otherwise are of size 1. Codes spend their levels on the
// offset, and nothing is left of what the tokens say; with the mean taken off first they are as good as any.
TEST_F(Calibration, BiasedKeysFailWithoutAndAreRepairedWith) {
    load("qwen2_biased");
    const Tokens tokens = random_tokens(420, vocabulary, 3);
    for (const int bits : {4, 3}) {
        const std::string kv = std::to_string(bits) + "/4";
        const Difference without = error(tokens, {.kv = kv, .calibrate = false});
        const Difference with = error(tokens, {.kv = kv});
        std::printf("biased keys, %s: mean KLD %.4f without, %.6f with (same top %.2f, %.2f)\n", kv.c_str(),
                    without.mean_kld, with.mean_kld, without.same_top, with.same_top);
        EXPECT_GT(without.mean_kld, 0.1) << "the failure is gone: this test shows nothing any more";
        EXPECT_LT(with.mean_kld, 0.05 * without.mean_kld);
    }
    load("qwen2"); // the same model with small offsets: how good unbiased keys are
    const double ordinary = error(tokens, {"4/4"}).mean_kld;
    load("qwen2_biased");
    EXPECT_LT(error(tokens, {"4/4"}).mean_kld, 3 * ordinary + 1e-4);
}

// All in one batch: what the ring no longer holds when the 128th key has been counted must come from the batch.
TEST_F(Calibration, OneLargeBatchIsCodedFromItsOwnRows) {
    load("qwen2_biased");
    const Tokens tokens = random_tokens(420, vocabulary, 3);
    const Shape shape = {.n_ubatch = 512};
    const Context reference = make_context(stock.get(), shape, {});
    const Logits expected = decode(reference.get(), tokens);
    auto error = [&](bool calibrate) {
        const Context c = context({.kv = "4/4", .calibrate = calibrate}, shape);
        return compare(decode(c.get(), tokens), expected, vocabulary).mean_kld;
    };
    const double with = error(true);
    const double without = error(false);
    std::printf("biased keys, one batch: mean KLD %.4f without, %.6f with\n", without, with);
    EXPECT_LT(with, 0.05 * without);
}

// Positions are the sequence's, not the rows': far from zero and behind another sequence the offset has turned.
TEST_F(Calibration, MeanIsTurnedToWhereTheRowsAre) {
    load("qwen2_biased");
    const Tokens tokens = random_tokens(150, vocabulary, 3);
    for (const int far : {0, 12000}) {
        auto logits = [&](llama_model* model, const Cache& cache) {
            const Context c = make_context(model, {.n_ctx = 512, .n_seq_max = 2, .unified = true}, cache);
            decode(c.get(), random_tokens(300, vocabulary, 4), {.sequence = 1, .chunk = 50});
            return decode(c.get(), tokens, {.begin = far, .chunk = 50});
        };
        const Logits expected = logits(stock.get(), {});
        const double with = compare(logits(plugin.get(), {"4/4"}), expected, vocabulary).mean_kld;
        const double without =
            compare(logits(plugin.get(), {.kv = "4/4", .calibrate = false}), expected, vocabulary).mean_kld;
        std::printf("biased keys at position %d: mean KLD %.4f without, %.6f with\n", far, without, with);
        EXPECT_LT(with, 0.05 * without);
    }
}

// Without a window, the ring of the first rows goes in the very batch that brings another stream's first row.
TEST_F(Calibration, FirstRowsArePinnedBeforeTheRingGoes) {
    load("llama_64");
    Tokens all(132);
    for (size_t i = 0; i < all.size(); ++i) {
        all[i] = static_cast<llama_token>(i * 97 % 256);
    }
    const Context c = context({"4/4", 0, 4}, {.n_ctx = 1024, .n_seq_max = 2});
    decode(c.get(), {all.begin(), all.begin() + 131});
    llama_batch batch = llama_batch_init(2, 0, 1);
    for (int i = 0; i < 2; ++i) {
        batch.token[i] = all[131];
        batch.pos[i] = i == 0 ? 131 : 0;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = i;
        batch.logits[i] = 1;
    }
    batch.n_tokens = 2;
    EXPECT_EQ(llama_decode(c.get(), batch), 0);
    llama_batch_free(batch);
    EXPECT_EQ(saved_conditioning(sequence_state(c.get(), 0), 4, 64, 2).coded, 128);
    EXPECT_EQ(saved_conditioning(sequence_state(c.get(), 1), 4, 64, 2).coded, 0) << "its row is pinned";
}

// A graph in which keys arrive as a copy, as where the weights are on another device. No host: the device itself.
TEST_F(Calibration, GraphThatHidesHowKeysTurn) {
    constexpr int64_t kCells = 256;
    constexpr int64_t kRows = 200;
    ggml_backend_dev_t device = plugin_device();
    ASSERT_NE(device, nullptr);
    set_cache({"4/4"});
    const LogCapture log;
    ggml_context* cache = ggml_init({4 * ggml_tensor_overhead(), nullptr, true});
    ggml_tensor* k_cache = ggml_new_tensor_3d(cache, GGML_TYPE_F16, 128, kCells, 1);
    ggml_tensor* v_cache = ggml_new_tensor_3d(cache, GGML_TYPE_F16, 128, kCells, 1);
    ggml_set_name(k_cache, "cache_k_l0");
    ggml_set_name(v_cache, "cache_v_l0");
    ggml_backend_buffer_t buffer =
        ggml_backend_alloc_ctx_tensors_from_buft(cache, ggml_backend_dev_buffer_type(device));
    ASSERT_NE(buffer, nullptr);

    ggml_context* ctx = ggml_init({16 << 20, nullptr, false});
    ggml_tensor* rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 128, kRows);
    ggml_tensor* index = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, kRows);
    ggml_tensor* q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 64, kRows, 4);
    ggml_tensor* mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, kCells, kRows);
    const Tokens noise = random_tokens(128 * kRows, 2001, 1);
    for (int64_t i = 0; i < 128 * kRows; ++i) {
        static_cast<float*>(rows->data)[i] = static_cast<float>(noise[static_cast<size_t>(i)] - 1000) / 1000;
    }
    for (int64_t i = 0; i < 64 * kRows * 4; ++i) {
        static_cast<float*>(q->data)[i] = static_cast<float>(noise[static_cast<size_t>(i % 25000)] - 1000) / 1000;
    }
    for (int64_t i = 0; i < kRows; ++i) {
        static_cast<int64_t*>(index->data)[i] = i;
        for (int64_t j = 0; j < kCells; ++j) {
            static_cast<ggml_fp16_t*>(mask->data)[i * kCells + j] = ggml_fp32_to_fp16(j <= i ? 0.0F : -INFINITY);
        }
    }
    ggml_cgraph* graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ggml_set_rows(ctx, k_cache, rows, index));
    ggml_build_forward_expand(graph, ggml_set_rows(ctx, v_cache, rows, index));
    auto heads = [&](ggml_tensor* t) {
        ggml_tensor* view = ggml_view_4d(ctx, t, 64, 2, kCells, 1, 128, 256, 256 * kCells, 0);
        return ggml_permute(ctx, view, 0, 2, 1, 3);
    };
    ggml_tensor* out = ggml_flash_attn_ext(ctx, q, heads(k_cache), heads(v_cache), mask, 0.125F, 0, 0);
    ASSERT_TRUE(ggml_backend_dev_supports_op(device, out));
    ggml_build_forward_expand(graph, out);
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    EXPECT_EQ(ggml_backend_graph_compute(backend, graph), GGML_STATUS_SUCCESS);
    EXPECT_EQ(log.count({"keys of 1 layers are not conditioned", "profile"}), 1);
    std::vector<uint8_t> row(256);
    ggml_backend_tensor_get(k_cache, row.data(), 100 * row.size(), row.size());
    std::unique_ptr<Store> store;
    ASSERT_TRUE(Store::create({.head_size = 64, .kv_heads = 2, .rows = 1}, {.bits = 4}, {}, store).ok());
    Store::NativePiece piece;
    EXPECT_TRUE(store->native_piece(row.data(), piece)) << "codes: nothing waits for a calibration that will not come";
    EXPECT_EQ(piece.conditioning_id, 0U);
    ggml_backend_free(backend);
    ggml_free(ctx);
    ggml_backend_buffer_free(buffer);
    ggml_free(cache);
}

TEST_F(Calibration, SameStartSameCache) {
    load("llama_64");
    const Tokens start = random_tokens(150, vocabulary, 8);
    std::vector<std::vector<uint8_t>> states;
    for (int run = 0; run < 2; ++run) {
        const Context c = context({"4/4", 16, 4});
        decode(c.get(), start, {.chunk = 40});
        states.push_back(sequence_state(c.get(), 0));
    }
    EXPECT_EQ(states[0], states[1]);
    const Context other = context({"4/4", 16, 4});
    decode(other.get(), random_tokens(150, vocabulary, 9), {.chunk = 40});
    const Saved a = saved_conditioning(states[0], 4, 64, 2);
    const Saved b = saved_conditioning(sequence_state(other.get(), 0), 4, 64, 2);
    EXPECT_TRUE(a.complete && b.complete);
    EXPECT_EQ(a.coded, 150 - 20);
    EXPECT_NE(a.id, 0U);
    EXPECT_NE(a.id, b.id);
    EXPECT_EQ(a.conditioning.rope.size(), 32U);
}

TEST_F(Calibration, BatchesMakeNoDifference) {
    load("llama_64");
    const Tokens start = random_tokens(200, vocabulary, 8);
    std::vector<Saved> saved;
    for (const int chunk : {1, 7, 100, 200}) {
        const Context c = context({"4/4"});
        decode(c.get(), start, {.chunk = chunk});
        for (const size_t layer : {0, 1}) {
            saved.push_back(saved_conditioning(sequence_state(c.get(), 0), 4, 64, 2, layer));
            ASSERT_TRUE(saved.back().complete) << chunk;
        }
    }
    for (size_t i = 2; i < saved.size(); ++i) {
        // The 128th key ends it in the middle of a batch, too. Layer 1's keys are made of what layer 0's attention gives,
        // and that reads codes as soon as its own keys are conditioned, in one batch of 200 from the first query on.
        const double limit = i % 2 == 0 ? 1e-3 : 5e-2;
        EXPECT_LT(rms_difference(saved[i].conditioning.mu, saved[i % 2].conditioning.mu), limit) << i;
        EXPECT_LT(rms_difference(saved[i].conditioning.lambda, saved[i % 2].conditioning.lambda), limit) << i;
    }
}

TEST_F(Calibration, OffLeavesTheKeysAlone) {
    load("llama_64");
    const Context c = context({.kv = "4/4", .calibrate = false});
    decode(c.get(), random_tokens(200, vocabulary, 8));
    const Saved saved = saved_conditioning(sequence_state(c.get(), 0), 4, 64, 2);
    EXPECT_EQ(saved.id, 0U);
    EXPECT_EQ(saved.coded, 200);
}

// Until 128 rows have come nothing is frozen, and what is in the ring is exact.
TEST_F(Calibration, FirstRowsAreExactAndNothingIsFrozenByFew) {
    load("llama_64");
    Tokens all(132); // no token twice, so that all rows count but the first four
    for (size_t i = 0; i < all.size(); ++i) {
        all[i] = static_cast<llama_token>(i * 97 % 256);
    }
    const Tokens start(all.begin(), all.begin() + 127);
    const Context c = context({"2/16"});
    const Context reference = make_context(plugin.get(), {}, {"16/16"});
    EXPECT_LT(compare(decode(c.get(), start), decode(reference.get(), start), vocabulary).relative, 2e-3);
    EXPECT_EQ(saved_conditioning(sequence_state(c.get(), 0), 2, 64, 2).coded, 0);
    decode(c.get(), {all.begin() + 127, all.begin() + 131}, {.begin = 127});
    EXPECT_EQ(saved_conditioning(sequence_state(c.get(), 0), 2, 64, 2).coded, 0) << "127 counted";
    decode(c.get(), {all[131]}, {.begin = 131});
    const Saved saved = saved_conditioning(sequence_state(c.get(), 0), 2, 64, 2);
    EXPECT_EQ(saved.coded, 132) << "128 counted, and the window is 0";
    EXPECT_NE(saved.id, 0U);
}

TEST_F(Calibration, DegenerateTextDoesNotCount) {
    load("llama_64");
    const LogCapture log;
    const Context c = context({"4/4"});
    const Tokens same(300, 17);
    decode(c.get(), same, {.chunk = 50});
    Saved saved = saved_conditioning(sequence_state(c.get(), 0), 4, 64, 2);
    EXPECT_EQ(saved.id, 0U);
    EXPECT_EQ(saved.coded, 300 - 192) << "rows beyond the ring are unconditioned codes";
    EXPECT_EQ(log.count({"conditioned"}), 0);
    decode(c.get(), random_tokens(150, vocabulary, 4), {.begin = 300, .chunk = 50});
    saved = saved_conditioning(sequence_state(c.get(), 0), 4, 64, 2);
    EXPECT_NE(saved.id, 0U);
    EXPECT_EQ(saved.coded, 450);
    EXPECT_EQ(log.count({"keys are conditioned from the first 128 rows", "2 layers"}), 1);
}

TEST_F(Calibration, AllStreamsTogether) {
    load("llama_64");
    const Context c = context({"4/4", 8, 2}, {.n_ctx = 1024, .n_seq_max = 4});
    std::vector<Tokens> sequences;
    for (uint32_t s = 0; s < 3; ++s) {
        sequences.push_back(random_tokens(60, vocabulary, 30 + s));
    }
    const std::vector<Logits> together = decode_together(c.get(), sequences, 20);
    ASSERT_EQ(together.size(), 3U);
    decode(c.get(), random_tokens(60, vocabulary, 40), {.sequence = 3});
    const Saved first = saved_conditioning(sequence_state(c.get(), 0), 4, 64, 2);
    EXPECT_TRUE(first.complete);
    for (llama_seq_id s = 1; s < 4; ++s) {
        const Saved saved = saved_conditioning(sequence_state(c.get(), s), 4, 64, 2);
        EXPECT_EQ(saved.id, first.id) << s;
        EXPECT_EQ(saved.coded, 50) << s;
    }
}

// Every cache of the host's: window layers, latent attention, no RoPE, ALiBi, hybrids, shared layers.
TEST_F(Calibration, EveryKindOfModelIsNotWorse) {
    for (const char* name : {"gemma2", "gemma3", "gemma4", "qwen3", "jamba", "deepseek2_mla", "deepseek2_mha", "bloom",
                             "gpt_oss", "deci", "llama_80"}) {
        SCOPED_TRACE(name);
        load(name);
        const Tokens tokens = random_tokens(400, vocabulary, 12);
        const LogCapture log;
        const double without = error(tokens, {.kv = "3/8", .calibrate = false}).relative;
        const double with = error(tokens, {.kv = "3/8"}).relative;
        std::printf("%-14s relative error at 3/8: %.4f without, %.4f with\n", name, without, with);
        EXPECT_LT(with, 1.05 * without);
        EXPECT_GE(log.count({"keys are conditioned from the first 128 rows"}), 1);
        EXPECT_EQ(log.count({"not conditioned"}), 0);
    }
}

// By so much that the offset turns by a radian or two: each row's mean must turn with it.
TEST_F(Calibration, ShiftedKeysKeepTheirMean) {
    load("qwen2_biased");
    const Tokens start = random_tokens(360, vocabulary, 3);
    const Tokens tail = random_tokens(60, vocabulary, 4);
    auto shifted = [&](llama_model* model, const Cache& cache) {
        const Context c = make_context(model, {.n_ctx = 1024}, cache);
        decode(c.get(), start, {.begin = 60000, .chunk = 60});
        llama_memory_t memory = llama_get_memory(c.get());
        EXPECT_TRUE(llama_memory_seq_rm(memory, 0, 60000, 60120));
        llama_memory_seq_add(memory, 0, 60120, -1, -60120);
        return decode(c.get(), tail, {.begin = 240, .chunk = 20});
    };
    const Logits reference = shifted(stock.get(), {});
    const double with = compare(shifted(plugin.get(), {"4/4"}), reference, vocabulary).mean_kld;
    const double without =
        compare(shifted(plugin.get(), {.kv = "4/4", .calibrate = false}), reference, vocabulary).mean_kld;
    std::printf("biased keys, shifted: mean KLD %.4f without, %.6f with\n", without, with);
    EXPECT_LT(with, 0.06 * without);
}

TEST_F(Calibration, FreshCacheTakesOverWhatSavedRowsBring) {
    load("llama_64");
    const Tokens start = random_tokens(200, vocabulary, 8);
    const Tokens tail = random_tokens(40, vocabulary, 9);
    for (const Cache& cache : {Cache{"4/4"}, Cache{"5/4", 32, 4}, Cache{"8/8", 16, 0}, Cache{"2/2", 0, 4}}) {
        SCOPED_TRACE(cache.kv);
        const Context original = context(cache);
        decode(original.get(), start, {.chunk = 50});
        const std::vector<uint8_t> state = sequence_state(original.get(), 0);
        const Logits expected = decode(original.get(), tail, {.begin = 200, .chunk = 8});
        const Context fresh = context(cache);
        ASSERT_TRUE(restore_sequence(fresh.get(), 0, state));
        EXPECT_EQ(sequence_state(fresh.get(), 0), state);
        EXPECT_TRUE(decode(fresh.get(), tail, {.begin = 200, .chunk = 8}) == expected);
    }
}

// A cache that has calibrated otherwise translates: as good as its own codes, not bit for bit.
TEST_F(Calibration, RowsOfAnotherCacheAreTranslated) {
    load("qwen2_biased");
    const Tokens start = random_tokens(300, vocabulary, 3);
    const Tokens tail = random_tokens(60, vocabulary, 4);
    const Context stock_context = make_context(stock.get(), {}, {});
    decode(stock_context.get(), start, {.chunk = 50});
    const Logits reference = decode(stock_context.get(), tail, {.begin = 300, .chunk = 20});

    const Cache cache{"5/5", 16, 4};
    const Context original = context(cache);
    decode(original.get(), start, {.chunk = 50});
    const std::vector<uint8_t> state = sequence_state(original.get(), 0);
    const Logits own = decode(original.get(), tail, {.begin = 300, .chunk = 20});

    const Context other = context(cache, {.n_ctx = 512, .n_seq_max = 2, .unified = true});
    decode(other.get(), random_tokens(150, vocabulary, 5), {.sequence = 1});
    ASSERT_TRUE(restore_sequence(other.get(), 0, state));
    const std::vector<uint8_t> translated = sequence_state(other.get(), 0);
    const Saved before = saved_conditioning(state, 5, 64, 2);
    const Saved after = saved_conditioning(translated, 5, 64, 2);
    EXPECT_EQ(after.coded, before.coded) << "translated rows take no room in the ring of exact rows";
    EXPECT_NE(after.id, before.id);
    const Logits got = decode(other.get(), tail, {.begin = 300, .chunk = 20});
    ASSERT_FALSE(got.empty());
    const double own_error = compare(own, reference, vocabulary).mean_kld;
    const double error = compare(got, reference, vocabulary).mean_kld;
    std::printf("translated rows: mean KLD %.6f, own rows %.6f\n", error, own_error);
    EXPECT_LT(error, 4 * own_error + 1e-4); // quantised twice

    // Rows saved before there was any conditioning.
    const Context early = context({.kv = "5/5", .window = 16, .sinks = 4, .calibrate = false});
    decode(early.get(), start, {.chunk = 50});
    ASSERT_TRUE(restore_sequence(other.get(), 0, sequence_state(early.get(), 0)));
    EXPECT_EQ(saved_conditioning(sequence_state(other.get(), 0), 5, 64, 2).id, after.id);
    EXPECT_FALSE(decode(other.get(), tail, {.begin = 300, .chunk = 20}).empty());
}

TEST_F(Calibration, TooFewSavedRowsAreRefusedInWords) {
    load("llama_64");
    const Cache cache{"4/4", 32, 4};
    const Context original = context(cache);
    decode(original.get(), random_tokens(150, vocabulary, 8));
    llama_memory_clear(llama_get_memory(original.get()), true);
    const Tokens brief = random_tokens(38, vocabulary, 9); // two rows of codes
    decode(original.get(), brief);
    const std::vector<uint8_t> state = sequence_state(original.get(), 0);
    EXPECT_EQ(saved_conditioning(state, 4, 64, 2).coded, 2);
    const LogCapture log;
    const Context fresh = context(cache);
    ASSERT_TRUE(restore_sequence(fresh.get(), 0, state));
    EXPECT_TRUE(decode(fresh.get(), random_tokens(1, vocabulary, 1), {.begin = 38}).empty());
    EXPECT_EQ(log.count({"cache_k_l0", "too few of its rows", "TURBOQUANT_PROFILE"}), 1);
    // The rows that were missing arrive with a longer sequence: then they are known.
    llama_memory_clear(llama_get_memory(fresh.get()), true);
    EXPECT_FALSE(decode(fresh.get(), random_tokens(10, vocabulary, 1)).empty());
    EXPECT_TRUE(restore_sequence(original.get(), 0, state));
    EXPECT_FALSE(decode(original.get(), random_tokens(1, vocabulary, 1), {.begin = 38}).empty());
}

// On a real model, with everything that a cache keeps exact switched off.
TEST_F(Calibration, RealModelLosesLess) {
    TQ_REQUIRE_ENVIRONMENT("TQ_TEST_SMOLLM2");
    plugin = load_model(environment("TQ_TEST_SMOLLM2"), Host::plugin);
    stock = load_model(environment("TQ_TEST_SMOLLM2"), Host::stock);
    ASSERT_TRUE(plugin && stock);
    vocabulary = vocabulary_of(stock.get());
    Tokens tokens = tokenize(stock.get(), kProse, false);
    ASSERT_GE(tokens.size(), 500U);
    tokens.resize(500);
    auto logits = [&](llama_model* model, const Cache& cache) {
        const Context c = make_context(model, {.threads = 2}, cache);
        Logits all = decode(c.get(), tokens, {.chunk = 250});
        return behind(all, 200, vocabulary);
    };
    const Logits reference = logits(stock.get(), {});
    const double floor = compare(logits(plugin.get(), {"16/16"}), reference, vocabulary).mean_kld;
    const double without =
        compare(logits(plugin.get(), {.kv = "4/4", .sinks = 4, .calibrate = false}), reference, vocabulary).mean_kld;
    const double with = compare(logits(plugin.get(), {.kv = "4/4", .sinks = 4}), reference, vocabulary).mean_kld;
    std::printf("SmolLM2, 4/4, no window: mean KLD %.4f without, %.4f with calibration (rounding alone %.4f)\n",
                without, with, floor);
    EXPECT_LT(with - floor, 0.6 * (without - floor));
}

} // namespace
} // namespace tqtest
