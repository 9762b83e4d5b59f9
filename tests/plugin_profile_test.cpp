// Profiles: made through the plug-in (what `tq tune` does), used, and refused when they are of another model.
#include "plugin_host.h"

#include "turboquant/profile.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <unistd.h>

namespace tqtest {
namespace {

using turboquant::LayerProfile;
using turboquant::Profile;

class ProfileTest : public testing::Test {
protected:
    void SetUp() override {
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
        folder = std::filesystem::temp_directory_path() / ("tq_profile_" + std::to_string(getpid()));
        std::filesystem::create_directories(folder);
        ggml_backend_dev_t device = plugin_device();
        ASSERT_NE(device, nullptr);
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
        start = reinterpret_cast<Start>(ggml_backend_reg_get_proc_address(reg, "turboquant_tune_start"));
        write = reinterpret_cast<Write>(ggml_backend_reg_get_proc_address(reg, "turboquant_tune_write"));
        ASSERT_TRUE(start != nullptr && write != nullptr);
    }
    void TearDown() override { std::filesystem::remove_all(folder); }

    std::string file(const std::string& name) const { return (folder / name).string(); }
    static std::string text(const char* message) { return message == nullptr ? "" : message; }

    // Decodes tokens with an fp16 cache while the plug-in collects, and writes the profile.
    std::string tune(llama_model* model, const std::string& name, int n_tokens = 300, int chunk = 100,
                     const Shape& shape = {}) {
        const std::string path = file(name);
        const Context context = make_context(model, shape, {"16/16"});
        EXPECT_TRUE(context);
        EXPECT_EQ(text(start()), "");
        decode(context.get(), random_tokens(n_tokens, vocabulary_of(model), 5), {.chunk = chunk});
        EXPECT_EQ(text(write(path.c_str(), "a model", "random tokens")), "");
        return path;
    }
    static Profile read(const std::string& path) {
        Profile profile;
        const turboquant::Status status = turboquant::read_profile(path, profile);
        EXPECT_TRUE(status.ok()) << status.message();
        return profile;
    }

    using Start = const char* (*)();
    using Write = const char* (*)(const char*, const char*, const char*);
    Start start = nullptr;
    Write write = nullptr;
    std::filesystem::path folder;
};

TEST_F(ProfileTest, HasEachLayersShapeAndTurns) {
    struct Expected {
        const char* model;
        size_t layers;
        int head_size, kv_heads;
        size_t pairs;
        unsigned second; // channel that turns with channel 0 of the first pair
    };
    for (const Expected& e : {Expected{"llama_64", 2, 64, 2, 32, 1}, Expected{"qwen3", 2, 128, 2, 64, 64},
                              Expected{"deepseek2_mla", 2, 576, 1, 32, 513}, Expected{"bloom", 2, 32, 6, 0, 0},
                              Expected{"jamba", 2, 64, 1, 0, 0}}) {
        SCOPED_TRACE(e.model);
        const Model model = load_tiny(e.model, Host::plugin);
        const Profile profile = read(tune(model.get(), e.model));
        EXPECT_EQ(profile.model, "a model");
        EXPECT_EQ(profile.text, "random tokens");
        ASSERT_EQ(profile.layers.size(), e.layers);
        const LayerProfile& layer = profile.layers[0];
        EXPECT_EQ(layer.head_size, e.head_size);
        EXPECT_EQ(layer.kv_heads, e.kv_heads);
        ASSERT_EQ(layer.keys.rope.size(), e.pairs);
        if (e.pairs > 0) {
            EXPECT_EQ(layer.keys.rope[0].second, e.second);
        }
        const auto channels = static_cast<size_t>(e.head_size * e.kv_heads);
        ASSERT_EQ(layer.keys.mu.size(), channels);
        ASSERT_EQ(layer.keys.lambda.size(), channels);
        for (size_t i = 0; i < channels; ++i) {
            EXPECT_TRUE(std::isfinite(layer.keys.mu[i]) && layer.keys.lambda[i] > 0);
        }
    }
}

// The biased channels of qwen2 (make_models.py: +8 on every 32nd from the fifth) must show in the mean.
TEST_F(ProfileTest, MeanIsThatOfTheKeys) {
    const Model model = load_tiny("qwen2", Host::plugin);
    const Profile profile = read(tune(model.get(), "qwen2"));
    double biased = 0;
    double others = 0;
    for (const LayerProfile& layer : profile.layers) {
        for (size_t i = 0; i < layer.keys.mu.size(); ++i) {
            (i % 32 == 5 ? biased : others) += std::fabs(layer.keys.mu[i]);
        }
    }
    biased /= static_cast<double>(profile.layers.size()) * 4;
    others /= static_cast<double>(profile.layers.size()) * 124;
    EXPECT_NEAR(biased, 8, 0.6);
    EXPECT_LT(others, 1);
}

TEST_F(ProfileTest, BatchesAndStreamsDoNotMatter) {
    const Model model = load_tiny("llama_64", Host::plugin);
    const Profile a = read(tune(model.get(), "a", 300, 300));
    const Profile b = read(tune(model.get(), "b", 300, 1));
    const Profile c = read(tune(model.get(), "c", 300, 100, {.n_ctx = 1024, .n_seq_max = 2}));
    ASSERT_EQ(a.layers.size(), b.layers.size());
    for (size_t l = 0; l < a.layers.size(); ++l) {
        for (size_t i = 0; i < a.layers[l].keys.mu.size(); ++i) {
            EXPECT_NEAR(a.layers[l].keys.mu[i], b.layers[l].keys.mu[i], 2e-3);
            EXPECT_NEAR(a.layers[l].keys.lambda[i], b.layers[l].keys.lambda[i], 2e-3);
            EXPECT_NEAR(a.layers[l].keys.mu[i], c.layers[l].keys.mu[i], 2e-3);
        }
    }
}

TEST_F(ProfileTest, IsUsedFromTheFirstRowOn) {
    const Model model = load_tiny("qwen2_biased", Host::plugin);
    const Model stock = load_tiny("qwen2_biased", Host::stock);
    const std::string path = tune(model.get(), "p");
    const int vocabulary = vocabulary_of(stock.get());
    const Tokens tokens = random_tokens(100, vocabulary, 6);
    const Context reference = make_context(stock.get(), {}, {});
    const Logits expected = decode(reference.get(), tokens);
    auto error = [&](const Cache& cache) {
        const Context c = make_context(model.get(), {}, cache);
        return compare(decode(c.get(), tokens), expected, vocabulary).mean_kld;
    };
    const LogCapture log;
    const double with = error({.kv = "4/4", .profile = path});
    const double without = error({.kv = "4/4", .calibrate = false});
    std::printf("biased keys, 100 tokens: mean KLD %.4f without, %.6f with a profile\n", without, with);
    EXPECT_LT(with, 0.05 * without);
    EXPECT_EQ(log.count({"KV cache:", "profile " + path}), 1);
    EXPECT_EQ(log.count({"does not seem"}), 0);
    // Saved rows of such a cache need no record: the id is the profile's.
    const Context a = make_context(model.get(), {}, {.kv = "4/4", .profile = path});
    const Context b = make_context(model.get(), {}, {.kv = "4/4", .profile = path});
    decode(a.get(), tokens);
    const std::vector<uint8_t> state = sequence_state(a.get(), 0);
    ASSERT_TRUE(restore_sequence(b.get(), 0, state));
    EXPECT_EQ(sequence_state(b.get(), 0), state);
    const Tokens tail = random_tokens(20, vocabulary, 7);
    EXPECT_TRUE(decode(b.get(), tail, {.begin = 100}) == decode(a.get(), tail, {.begin = 100}));
}

TEST_F(ProfileTest, OfAnotherShapeIsRefusedAndNamed) {
    const Model small = load_tiny("llama_64", Host::plugin);
    const std::string path = tune(small.get(), "llama_64");
    const LogCapture log;
    const Model large = load_tiny("llama_80", Host::plugin); // rows of another length
    EXPECT_FALSE(make_context(large.get(), {}, {.kv = "4/4", .profile = path}));
    EXPECT_EQ(log.count({"layer 0", "2 KV heads of 64", "160 elements", "tq tune"}), 1);
    const Model one = load_tiny("llama_128", Host::plugin); // rows of the same length, one head of 128
    EXPECT_FALSE(make_context(one.get(), {}, {.kv = "4/4", .profile = path}));
    const Context pass = make_context(large.get(), {}, {.kv = "16/16", .profile = path});
    EXPECT_FALSE(pass) << "of another model, whatever it would be used for";
}

TEST_F(ProfileTest, UnreadableFilesAreRefusedAndNamed) {
    const Model model = load_tiny("llama_64", Host::plugin);
    const LogCapture log;
    EXPECT_FALSE(make_context(model.get(), {}, {.kv = "4/4", .profile = file("missing")}));
    EXPECT_EQ(log.count({"missing", "tq tune"}), 1);
    const std::string path = tune(model.get(), "damaged");
    std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(200);
    stream.put('x');
    stream.close();
    EXPECT_FALSE(make_context(model.get(), {}, {.kv = "4/4", .profile = path}));
    EXPECT_EQ(log.count({path, "damaged"}), 1);
}

// Same shapes, other numbers: one warning, and it goes on.
TEST_F(ProfileTest, OfAnotherModelIsDoubted) {
    const Model biased = load_tiny("qwen2_biased", Host::plugin);
    const std::string path = tune(biased.get(), "biased");
    const Model model = load_tiny("qwen2", Host::plugin);
    const LogCapture log;
    const Context c = make_context(model.get(), {}, {.kv = "4/4", .profile = path});
    ASSERT_TRUE(c);
    for (int i = 0; i < 4; ++i) {
        EXPECT_FALSE(decode(c.get(), random_tokens(50, 256, static_cast<uint32_t>(i)), {.begin = 50 * i}).empty());
        EXPECT_EQ(log.count({"does not seem to be of this model", "2 of 2 layers", "tq tune"}), i < 1 ? 0 : 1) << i;
    }
}

// The graph knows better how keys turn than a profile that was made with another RoPE setting.
TEST_F(ProfileTest, TurnsFollowTheGraph) {
    const Model model = load_tiny("qwen2_biased", Host::plugin);
    const std::string path = tune(model.get(), "p");
    Profile profile = read(path);
    for (LayerProfile& layer : profile.layers) {
        for (auto& pair : layer.keys.rope) {
            pair.theta *= 3;
        }
    }
    ASSERT_TRUE(turboquant::write_profile(file("wrong"), profile).ok());
    const Tokens tokens = random_tokens(400, 256, 6);
    auto logits = [&](const std::string& with) {
        const Context c = make_context(model.get(), {}, {.kv = "4/4", .profile = with});
        return decode(c.get(), tokens, {.chunk = 100});
    };
    EXPECT_TRUE(logits(file("wrong")) == logits(path));
}

TEST_F(ProfileTest, BitsOfEachLayer) {
    const Model model = load_tiny("llama_64", Host::plugin);
    const std::string plain = tune(model.get(), "plain");
    Profile profile = read(plain);
    profile.layers[0].key_bits = 8;
    profile.layers[0].value_bits = 2;
    profile.layers[1].key_bits = 16;
    profile.layers[1].value_bits = 4;
    profile.bits = 7.5;
    const std::string path = file("bits");
    ASSERT_TRUE(turboquant::write_profile(path, profile).ok());
    const Tokens tokens = random_tokens(60, 256, 6);
    auto logits = [&](const Cache& cache) {
        const Context c = make_context(model.get(), {}, cache);
        EXPECT_TRUE(c) << cache.kv;
        return c ? decode(c.get(), tokens) : Logits();
    };
    auto rows = [&](const Cache& cache, size_t layer, bool keys) {
        const Context c = make_context(model.get(), {}, cache);
        decode(c.get(), tokens);
        const std::vector<uint8_t> state = sequence_state(c.get(), 0);
        StateMap map;
        map_state(state, map);
        const StateRows& r = (keys ? map.keys : map.values)[layer];
        return std::vector<uint8_t>(state.begin() + static_cast<std::ptrdiff_t>(r.offset),
                                    state.begin() + static_cast<std::ptrdiff_t>(r.offset + 60 * r.row_bytes));
    };
    const Cache automatic{.kv = "auto", .profile = path};
    EXPECT_EQ(rows(automatic, 0, true), rows({.kv = "8/4", .profile = path}, 0, true));
    EXPECT_EQ(rows(automatic, 0, false), rows({.kv = "8/2", .profile = path}, 0, false));
    EXPECT_NE(rows(automatic, 0, true), rows({.kv = "5/4", .profile = path}, 0, true));
    EXPECT_EQ(rows(automatic, 1, true)[0] == 0x54, false) << "fp16 rows have no header of codes";
    EXPECT_FALSE(logits(automatic).empty());
    const LogCapture log;
    EXPECT_FALSE(make_context(model.get(), {}, {.kv = "auto"}));
    EXPECT_EQ(log.count({"TURBOQUANT_KV=auto", "TURBOQUANT_PROFILE", "tq tune --budget"}), 1);
    EXPECT_FALSE(make_context(model.get(), {}, {.kv = "auto", .profile = plain}));
    EXPECT_EQ(log.count({plain, "has none", "tq tune --budget"}), 1);
}

TEST_F(ProfileTest, TuningSaysWhatIsWrong) {
    const std::string path = file("none");
    EXPECT_NE(text(write(path.c_str(), "", "")).find("not started"), std::string::npos);
    start();
    EXPECT_NE(text(write(path.c_str(), "", "")).find("no keys were seen"), std::string::npos);
    EXPECT_NE(text(write(path.c_str(), "", "")).find("not started"), std::string::npos) << "writing ends it";
    const Model model = load_tiny("llama_64", Host::plugin);
    const Context context = make_context(model.get(), {}, {"16/16"});
    start();
    decode(context.get(), random_tokens(3, vocabulary_of(model.get()), 1));
    EXPECT_NE(text(write(path.c_str(), "", "")).find("longer text"), std::string::npos);
    start();
    decode(context.get(), random_tokens(30, vocabulary_of(model.get()), 1), {.begin = 3});
    EXPECT_NE(text(write(file("no/such/folder").c_str(), "", "")), "");
    EXPECT_FALSE(std::filesystem::exists(path));
}

} // namespace
} // namespace tqtest
