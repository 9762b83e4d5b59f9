// Compressed tokens are attended to: a fact planted thousands of tokens back is recalled with no exact row anywhere, and
// damaging its rows in the store, and only those, makes the answer fail.
#include "plugin_host.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace tqtest {
namespace {

// Sentences without names or numbers, never twice the same in a row.
std::string filler(int sentences) {
    const char* who[] = {"The old man",   "A young woman", "My neighbour", "The teacher",
                         "A tall sailor", "The baker",     "Her brother",  "The doctor"};
    const char* did[] = {"waited near", "walked past", "looked for", "talked about", "painted",
                         "forgot",      "counted",     "carried",    "cleaned",      "measured"};
    const char* what[][2] = {
        {"river", "boats"},    {"market", "baskets"}, {"garden", "roses"}, {"library", "letters"}, {"harbour", "ropes"},
        {"mountain", "goats"}, {"kitchen", "spoons"}, {"school", "chalk"}, {"bridge", "lanterns"}, {"forest", "owls"}};
    std::string text;
    for (int i = 0; i < sentences; ++i) {
        const auto& w = what[(i * 7 + i / 10) % 10];
        text +=
            std::string(" ") + who[i % 8] + " " + did[(i * 3 + i / 8) % 10] + " the " + w[0] + " and the " + w[1] + ".";
    }
    return text;
}

class Recall : public testing::Test {
protected:
    void SetUp() override {
        TQ_REQUIRE_ENVIRONMENT("TQ_TEST_SMOLLM2");
        model = load_model(environment("TQ_TEST_SMOLLM2"), Host::plugin);
        ASSERT_TRUE(model);
    }
    Model model;
};

TEST_F(Recall, FactFarBackThroughCodesAlone) {
    const Tokens before = tokenize(model.get(), "Here is a long story.\n\n", true);
    const Tokens fact = tokenize(model.get(), "The secret password of the castle is Zebra-7431.", false);
    const Tokens after = tokenize(model.get(),
                                  filler(200) + "\n\nQuestion: What is the secret password of the castle?\nAnswer: "
                                                "The secret password of the castle is",
                                  false);
    Tokens prompt = before;
    prompt.insert(prompt.end(), fact.begin(), fact.end());
    prompt.insert(prompt.end(), after.begin(), after.end());
    const Tokens head(prompt.begin(), prompt.end() - 1);
    const auto n = static_cast<llama_pos>(head.size());
    std::printf("%zu tokens, the fact lies %zu back\n", prompt.size(), prompt.size() - before.size() - fact.size());
    ASSERT_GT(after.size(), 1900u);

    // No window, no sinks: every token that attention sees is a code.
    const Context context = make_context(model.get(), {.n_ctx = 2560, .n_ubatch = 512, .threads = 2}, {"4/4", 0, 0});
    ASSERT_TRUE(context);
    ASSERT_FALSE(generate(context.get(), head, 1).empty());
    ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(context.get()), 0, n, -1));
    const std::vector<uint8_t> state = sequence_state(context.get(), 0);
    StateMap map;
    ASSERT_TRUE(map_state(state, map));
    ASSERT_EQ(map.positions.size(), head.size());

    auto answer = [&](const std::vector<uint8_t>& from) {
        llama_memory_clear(llama_get_memory(context.get()), true);
        EXPECT_TRUE(restore_sequence(context.get(), 0, from));
        return text_of(model.get(), generate(context.get(), {prompt.back()}, 8, {.begin = n}));
    };
    // The rows of `count` cells from `first` on give way to those of cells `distance` further: whole native rows, so that
    // the store takes them.
    auto overwrite = [&](size_t first, size_t count, size_t distance) {
        std::vector<uint8_t> damaged = state;
        for (const auto* side : {&map.keys, &map.values}) {
            for (const StateRows& rows : *side) {
                for (size_t i = first; i < first + count; ++i) {
                    std::memcpy(damaged.data() + rows.offset + i * rows.row_bytes,
                                state.data() + rows.offset + (i + distance) * rows.row_bytes, rows.row_bytes);
                }
            }
        }
        return damaged;
    };
    const std::string good = answer(state);
    const std::string damaged = answer(overwrite(before.size(), fact.size(), 600));
    const std::string control = answer(overwrite(before.size() + 900, fact.size(), 600));
    std::printf("answer '%s', with the fact's rows damaged '%s', with other rows damaged '%s'\n", good.c_str(),
                damaged.c_str(), control.c_str());
    EXPECT_NE(good.find("Zebra-7431"), std::string::npos) << good;
    EXPECT_EQ(damaged.find("7431"), std::string::npos) << damaged;
    EXPECT_EQ(damaged.find("Zebra"), std::string::npos) << damaged;
    EXPECT_NE(control.find("Zebra-7431"), std::string::npos) << control;
}

TEST_F(Recall, AnswersStaySensible) {
    struct {
        const char* question;
        const char* expected;
    } const cases[] = {{"What is the capital of France?", "Paris"},
                       {"What is the opposite of hot?", "cold"},
                       {"Name the planet we live on.", "Earth"}};
    for (const Cache& cache : {Cache{"4/4", 32, 4}, Cache{"5/4", 32, 4}, Cache{"4/4", 0, 0}}) {
        const Context context = make_context(model.get(), {.n_ctx = 512, .threads = 2}, cache);
        ASSERT_TRUE(context);
        for (const auto& c : cases) {
            llama_memory_clear(llama_get_memory(context.get()), true);
            const Tokens prompt =
                tokenize(model.get(),
                         std::string("<|im_start|>user\n") + c.question + "<|im_end|>\n<|im_start|>assistant\n", false);
            const std::string text = text_of(model.get(), generate(context.get(), prompt, 40));
            std::printf("%s window %d: %s -> %s\n", cache.kv.c_str(), cache.window, c.question, text.c_str());
            EXPECT_NE(text.find(c.expected), std::string::npos) << c.question << " -> " << text;
        }
    }
}

} // namespace
} // namespace tqtest
