// What the plug-in cannot take is refused in words: an orderly failure and one line that says what to do, never an abort.
// Each attempt is a process of its own (plugin_child), so that a crash shows as what it is.
#include "plugin_host.h"

#include <algorithm>
#include <sstream>

namespace tqtest {
namespace {

enum Status { worked = 0, no_plugin = 3, no_model = 4, no_context = 5, no_decode = 6 };

const std::vector<std::string> kClean = {"TURBOQUANT_KV",      "TURBOQUANT_WINDOW",    "TURBOQUANT_SINKS",
                                         "TURBOQUANT_ISA",     "TURBOQUANT_HEAD_SIZE", "TURBOQUANT_SINK_SEQUENCES",
                                         "TURBOQUANT_PROFILE", "TURBOQUANT_CALIBRATE", "GGML_BACKEND_PATH"};

Outcome attempt(const std::string& model, const std::vector<std::string>& options,
                std::vector<std::string> variables = {}) {
    for (const std::string& name : kClean) {
        const bool given = std::any_of(variables.begin(), variables.end(),
                                       [&](const std::string& v) { return v.rfind(name + "=", 0) == 0; });
        if (!given) {
            variables.push_back(name);
        }
    }
    std::vector<std::string> command = {environment("TQ_TEST_CHILD"), "context",
                                        environment("TQ_TEST_TINY") + "/" + model + ".gguf"};
    command.insert(command.end(), options.begin(), options.end());
    return run_program(command, variables, 60);
}

// What the plug-in and the host complained of, for a failing test's message.
std::string complaints(const Outcome& run) {
    std::istringstream text(run.err);
    std::string result;
    for (std::string line; std::getline(text, line);) {
        for (const char* word : {"turboquant", "fail", "error", "assert", "killed", "ASSERT"}) {
            if (line.find(word) != std::string::npos) {
                result += "  " + line + "\n";
                break;
            }
        }
    }
    return result.empty() ? "  (no complaint in " + std::to_string(run.err.size()) + " bytes of log)\n" : result;
}

// Lines of ours in the output that have all the words.
int lines_with(const Outcome& run, const std::vector<std::string>& words) {
    std::istringstream text(run.err + run.out);
    int n = 0;
    for (std::string line; std::getline(text, line);) {
        n += std::all_of(words.begin(), words.end(),
                         [&](const std::string& w) { return line.find(w) != std::string::npos; });
    }
    return n;
}

class Refusal : public testing::Test {
protected:
    void SetUp() override { TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY"); }
};

TEST_F(Refusal, NothingIsRefusedByDefault) {
    for (const char* model :
         {"llama_64", "gemma2", "gemma3", "gemma4", "jamba", "mamba", "deepseek2_mla", "deepseek2_mha", "bloom",
          "gpt_oss", "qwen2", "qwen3", "deci", "llama_80", "llama_group16"}) {
        const Outcome run = attempt(model, {});
        EXPECT_EQ(run.status, worked) << model << "\n" << complaints(run);
        EXPECT_NE(run.out.find("decoded 40 tokens"), std::string::npos) << run.out;
        EXPECT_EQ(run.out.find("nan"), std::string::npos) << run.out;
    }
}

TEST_F(Refusal, FlashAttentionOff) {
    const Outcome run = attempt("llama_64", {"no-flash"});
    EXPECT_EQ(run.status, no_context) << complaints(run);
    EXPECT_GE(lines_with(run, {"lash attention"}), 1) << complaints(run);
    EXPECT_GE(lines_with(run, {"-fa on"}) + lines_with(run, {"flash_attn"}), 1) << "no remedy in\n" << complaints(run);
}

// A quantised cache type of the host: refused, or taken as the choice of bits; never both ignored and silent.
TEST_F(Refusal, CacheTypesOfTheHost) {
    for (const char* type : {"q8_0", "q4_0", "q5_1", "bf16", "f32"}) {
        const Outcome run = attempt("llama_64", {std::string("type=") + type});
        EXPECT_TRUE(run.status == no_context || run.status == worked) << type << ": " << run.status << "\n"
                                                                      << complaints(run);
        if (run.status == no_context) {
            EXPECT_GE(lines_with(run, {"turboquant", type, "f16"}), 1) << type << "\n" << complaints(run);
        }
    }
}

struct Wrong {
    const char* variable;
    const char* value;
};

TEST_F(Refusal, WrongValuesAreNamed) {
    for (const Wrong& wrong : {Wrong{"TURBOQUANT_KV", "nonsense"},
                               {"TURBOQUANT_KV", ""},
                               {"TURBOQUANT_KV", "7/4"},
                               {"TURBOQUANT_KV", "4/7"},
                               {"TURBOQUANT_KV", "4/"},
                               {"TURBOQUANT_KV", "4/4/4"},
                               {"TURBOQUANT_KV", "-4/4"},
                               {"TURBOQUANT_KV", "tq9"},
                               {"TURBOQUANT_KV", "99999999999999999999/4"},
                               {"TURBOQUANT_WINDOW", "-1"},
                               {"TURBOQUANT_WINDOW", "abc"},
                               {"TURBOQUANT_WINDOW", "12x"},
                               {"TURBOQUANT_SINKS", "-3"},
                               {"TURBOQUANT_SINKS", "1e3"},
                               {"TURBOQUANT_ISA", "sse9"},
                               {"TURBOQUANT_CALIBRATE", "yes"},
                               {"TURBOQUANT_CALIBRATE", ""},
                               {"TURBOQUANT_PROFILE", "no/such/file"},
                               {"TURBOQUANT_HEAD_SIZE", "0"},
                               {"TURBOQUANT_HEAD_SIZE", "many"}}) {
        const Outcome run = attempt("llama_64", {}, {std::string(wrong.variable) + "=" + wrong.value});
        EXPECT_TRUE(run.status == no_plugin || run.status == no_model || run.status == no_context)
            << wrong.variable << "=" << wrong.value << ": " << run.status << "\n"
            << complaints(run);
        EXPECT_GE(lines_with(run, {"turboquant", wrong.variable, wrong.value}), 1) << complaints(run);
    }
}

TEST_F(Refusal, UnknownVariablesAreNamed) {
    const Outcome run = attempt("llama_64", {}, {"TURBOQUANT_WINDWO=16"});
    EXPECT_GE(lines_with(run, {"TURBOQUANT_WINDWO"}), 1) << complaints(run);
}

TEST_F(Refusal, InactivePlugInSaysSoOnce) {
    struct {
        std::vector<std::string> options;
        std::vector<std::string> remedies; // one of them is named
    } const cases[] = {{{"layers=0"}, {"-ngl", "n_gpu_layers"}}, {{"no-offload"}, {"-nkvo", "offload_kqv"}}};
    for (const auto& c : cases) {
        const Outcome run = attempt("llama_64", c.options);
        EXPECT_EQ(run.status, worked) << c.options[0] << "\n" << complaints(run);
        int named = 0;
        for (const std::string& remedy : c.remedies) {
            named = std::max(named, lines_with(run, {"turboquant", remedy}));
        }
        EXPECT_EQ(named, 1) << c.options[0] << "\n" << complaints(run);
    }
    // And says nothing of the kind when it is active.
    EXPECT_EQ(lines_with(attempt("llama_64", {}), {"turboquant", "-ngl"}), 0);
}

// A hint that is wrong must not corrupt anything: refused in words, or overruled by what the graph says.
TEST_F(Refusal, WrongHeadSizeHint) {
    const Outcome run = attempt("llama_64", {}, {"TURBOQUANT_HEAD_SIZE=96"});
    EXPECT_TRUE(run.status == worked || run.status == no_context) << run.status << "\n" << complaints(run);
    if (run.status == no_context) {
        EXPECT_GE(lines_with(run, {"TURBOQUANT_HEAD_SIZE"}), 1) << complaints(run);
    } else {
        EXPECT_EQ(run.out, attempt("llama_64", {}).out);
    }
}

TEST_F(Refusal, InstructionSetsAgree) {
    const Outcome best = attempt("llama_64", {"tokens=60"});
    const Outcome portable = attempt("llama_64", {"tokens=60"}, {"TURBOQUANT_ISA=portable"});
    ASSERT_EQ(best.status, worked) << complaints(best);
    ASSERT_EQ(portable.status, worked) << complaints(portable);
    auto sum = [](const Outcome& run) { return std::stod(run.out.substr(run.out.rfind(' '))); };
    EXPECT_NEAR(sum(portable), sum(best), 0.002 * std::abs(sum(best)) + 0.05);
}

} // namespace
} // namespace tqtest
