// tq run: one question, one answer.
#include "commands.h"
#include "options.h"
#include "report.h"
#include "start.h"
#include "terminal.h"

#include "llm/conversation.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/utf8.h"

#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>

#include <unistd.h>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

struct RunFlags {
    ModelFlags model;
    AnswerFlags answer;
    std::string prompt;
    bool prompt_given = false;
};

std::string read_prompt(const RunFlags& flags) {
    std::string prompt = flags.prompt;
    const char* source = "-p";
    if (!flags.prompt_given) {
        if (isatty(STDIN_FILENO) != 0) {
            throw llm::UsageError("no prompt: give one with -p TEXT or pipe it in; tq chat talks");
        }
        source = "standard input";
        prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
        while (!prompt.empty() && (prompt.back() == '\n' || prompt.back() == '\r')) {
            prompt.pop_back();
        }
    }
    if (const size_t at = llm::first_invalid_utf8(prompt); at != std::string::npos) {
        throw llm::Error(
            fmt::format("{}: byte {} is not UTF-8 text; convert it first, for example with iconv", source, at));
    }
    if (prompt.find_first_not_of(" \t\r\n") == std::string::npos) {
        throw llm::UsageError(fmt::format("{}: the prompt is empty; give some text", source));
    }
    return prompt;
}

int run(const RunFlags& flags) {
    check_flags(flags.model);
    check_flags(flags.answer);
    const llm::KvChoice kv = choose_kv(flags.model);
    const std::string prompt = read_prompt(flags);
    llm::install_log(flags.model.verbose);
    catch_interrupts();
    const std::unique_ptr<Engine> engine = start(flags.model, kv);

    llm::Conversation conversation(*engine->session);
    conversation.set_system(flags.answer.system.value_or(conversation.chat_template().default_system()));
    const auto kind = conversation.chat_template().kind();
    if (kind == llm::ChatTemplate::Kind::chatml) {
        print_note("the model's chat template is unknown to libllama: using ChatML, answers may suffer");
    } else if (kind == llm::ChatTemplate::Kind::none && flags.model.verbose) {
        print_note("the model has no chat template: it continues the prompt");
    }

    llm::AskOptions options;
    options.sampling = resolve_sampling(flags.answer.sampling, engine->model);
    options.limit = flags.answer.limit;
    options.progress = progress("reading the prompt");
    if (!flags.model.json) {
        options.on_text = [](const std::string& text) {
            std::fputs(text.c_str(), stdout);
            std::fflush(stdout);
        };
    }
    const llm::Answer answer = conversation.ask(prompt, options);
    if (flags.model.json) {
        const nlohmann::json root = {{"answer", answer.text},         {"stop", llm::stop_name(answer.stop)},
                                     {"model", engine->model.path()}, {"kv", engine->kv.describe()},
                                     {"seed", options.sampling.seed}, {"stats", stats_json(answer.stats)}};
        fmt::print("{}\n", root.dump());
    } else {
        std::fputs("\n", stdout);
        std::fflush(stdout);
    }
    print_note(stats_line(answer, flags.answer.limit));
    return answer.stop == llm::Stop::interrupted ? 1 : 0;
}

} // namespace

Command add_run(CLI::App& program) {
    auto flags = std::make_shared<RunFlags>();
    CLI::App* command = program.add_subcommand("run", "answer once: tq run -p PROMPT, or the prompt on standard input");
    CLI::Option* prompt = command->add_option("-p,--prompt", flags->prompt, "the prompt")->type_name("TEXT");
    add_model_flags(*command, flags->model);
    add_answer_flags(*command, flags->answer);
    return [flags, prompt] {
        flags->prompt_given = prompt->count() > 0;
        return run(*flags);
    };
}

} // namespace turboquant::app
