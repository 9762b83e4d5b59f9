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
