// tq demo: the same question with llama.cpp's f16 cache and with TurboQuant.
#include "commands.h"
#include "options.h"
#include "report.h"
#include "start.h"
#include "terminal.h"

#include "llm/conversation.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/plugin.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace turboquant::app {
namespace {

// Something to read, so that the answer has to come from the cache.
constexpr const char* kText =
    R"(The lighthouse at Harrow Point was built in 1862, after three ships had been lost on the rocks below it in one
winter. Its first keeper was Edith Marlow, a sailmaker's daughter from the village, who was thirty years old when she
climbed the stairs for the first time and who stayed for forty-one years. She kept a journal. Every evening she wrote
down the direction of the wind, the ships that had passed, and what she had eaten, which was mostly fish and potatoes.

In the autumn of 1879 a storm broke the great lens. The replacement had to come by sea from France and took eleven
weeks. During those weeks Edith and her nephew Tom lit a fire of driftwood and tar on the cliff each night and took
turns to feed it until the morning. Not one ship was lost. The harbour master of the town across the bay, who had first
asked for a younger keeper to be sent, came over by boat to apologise, and brought her a green parrot named Captain,
which had belonged to a whaler. The parrot learned to call out the hours, though it was always a little early.

When Edith retired in 1903 the village gave her a small house with a garden, and she planted pear trees in it. The
lighthouse was run by other keepers until 1958, when it was fitted with an electric lamp that needed nobody. Today it is
a museum. Visitors can read the journal, see the stuffed parrot, and eat pears from the garden in September.)";
constexpr const char* kQuestion = "In which year was the lighthouse built? Answer in one sentence.";
constexpr int64_t kContext = 4096;

struct DemoFlags {
    ModelFlags model;
    int64_t limit = 96;
};

struct Result {
    llm::KvChoice kv;
    llm::Answer answer;
};

Result answer_with(const DemoFlags& flags, const llm::KvChoice& kv, const std::string& prompt) {
    const std::unique_ptr<Engine> engine = start(flags.model, kv);
    llm::Conversation conversation(*engine->session);
    conversation.set_system(conversation.chat_template().default_system());
    llm::AskOptions options;
    options.sampling.temp = 0;
    options.limit = flags.limit;
    options.progress = progress("reading the prompt");
    if (!flags.model.json) {
        fmt::print("{}\n", bold(fmt::format("{}:", engine->kv.describe())));
        options.on_text = [](const std::string& text) {
            std::fputs(text.c_str(), stdout);
            std::fflush(stdout);
        };
    }
    std::fflush(stdout);
    Result result{engine->kv, conversation.ask(prompt, options)};
    if (!flags.model.json) {
        fmt::print("\n\n");
        std::fflush(stdout);
    }
    return result;
}

void print_table(const std::vector<Result>& results) {
    const int64_t f16 = results.front().answer.stats.kv_bytes;
    fmt::print("{:<8} {:>12} {:>10} {:>14} {:>14}\n", "cache", "KV bytes", "below f16", "prompt tok/s", "answer tok/s");
    for (const Result& result : results) {
        const llm::Stats& stats = result.answer.stats;
        fmt::print("{:<8} {:>12} {:>10} {:>14.1f} {:>14.1f}\n", result.kv.name, llm::format_bytes(stats.kv_bytes),
                   stats.kv_bytes > 0
                       ? fmt::format("{:.2f}x", static_cast<double>(f16) / static_cast<double>(stats.kv_bytes))
                       : "-",
                   stats.read_speed(), stats.answer_speed());
    }
}

// The program as the user can type it: its name where that finds it, else its path.
std::string own_command() {
    std::error_code ignored;
    const auto self = std::filesystem::read_symlink("/proc/self/exe", ignored);
    if (const auto path = environment("PATH")) {
        size_t begin = 0;
        while (begin <= path->size()) {
            const size_t end = std::min(path->find(':', begin), path->size());
            const std::filesystem::path candidate = path->substr(begin, end - begin) + "/tq";
            if (std::filesystem::equivalent(candidate, self, ignored)) {
                return "tq";
            }
            begin = end + 1;
        }
    }
    const auto relative = std::filesystem::proximate(self, ignored);
    return relative.native().size() < self.native().size() ? relative.string() : self.string();
}

int demo(const DemoFlags& flags) {
    check_flags(flags.model);
    DemoFlags used = flags;
    used.model.context = flags.model.context.value_or(kContext);
    const llm::KvChoice kv = choose_kv(flags.model);
    llm::install_log(flags.model.verbose);
    catch_interrupts();
    const std::string model = llm::resolve_model_path(flags.model.model);
    const std::string prompt = fmt::format("{}\n\n{}", kText, kQuestion);
    if (!flags.model.json) {
        fmt::print("{} reads a story of {} characters and is asked: {}\nContext {} tokens; the likeliest token each "
                   "time.\n\n",
                   std::filesystem::path(model).filename().string(), std::string(kText).size(), kQuestion,
                   *used.model.context);
    }
    std::vector<Result> results;
    for (const llm::KvChoice& choice : {llm::parse_kv("f16"), kv}) {
        results.push_back(answer_with(used, choice, prompt));
        if (results.back().answer.stop == llm::Stop::interrupted) {
            throw llm::Error("stopped by Ctrl-C");
        }
    }
    if (flags.model.json) {
        nlohmann::json rows = nlohmann::json::array();
        for (const Result& result : results) {
            rows.push_back({{"kv", result.kv.describe()},
                            {"answer", result.answer.text},
                            {"stats", stats_json(result.answer.stats)}});
        }
        fmt::print("{}\n", nlohmann::json{{"model", model}, {"question", kQuestion}, {"results", rows}}.dump(2));
        return 0;
    }
    print_table(results);
    const std::string tq = own_command();
    fmt::print("\nKV bytes are what libllama allocated for the context of {}.\nGo on with\n"
               "  {} chat\n"
               "  {} run -p 'Why is the sky blue?'\n"
               "  GGML_BACKEND_PATH=$({} plugin-path) llama-server --device TQ0 -fa on -m {}\n",
               results.front().answer.stats.context_size, tq, tq, tq, model);
    return 0;
}

} // namespace

Command add_demo(CLI::App& program) {
    auto flags = std::make_shared<DemoFlags>();
    CLI::App* command = program.add_subcommand("demo", "the same question with an f16 cache and with TurboQuant");
    add_model_flags(*command, flags->model);
    command->add_option("-n", flags->limit, "most tokens of an answer (default 96)")->type_name("N");
    return [flags] { return demo(*flags); };
}

} // namespace turboquant::app
