#include "commands.h"
#include "terminal.h"

#include "llm/error.h"

#include <cstdio>
#include <exception>
#include <new>
#include <utility>
#include <vector>

#include <llama.h>

#include <fmt/format.h>

namespace {

using namespace turboquant;
constexpr int kFailed = 1;
constexpr int kUsage = 2;

std::string version() {
    return fmt::format("tq {} (llama.cpp {})\n", TURBOQUANT_VERSION, llama_version());
}

// The command that was given, the innermost one ("kld" of "eval"); `words` becomes "tq eval kld".
CLI::App* chosen_command(CLI::App& program, std::string& words) {
    CLI::App* chosen = &program;
    words = program.get_name();
    while (!chosen->get_subcommands().empty()) {
        chosen = chosen->get_subcommands().front();
        words += ' ' + chosen->get_name();
    }
    return chosen;
}

int run(int argc, char** argv) {
    CLI::App program("Chat with language models whose KV cache TurboQuant keeps small.", "tq");
    program.require_subcommand(0, 1);
    program.get_formatter()->column_width(28);
    bool show_version = false;
    program.add_flag("--version", show_version, "print the version");

    std::vector<std::pair<std::string, app::Command>> commands = {{"run", app::add_run(program)},
                                                                  {"chat", app::add_chat(program)},
                                                                  {"serve", app::add_serve(program)},
                                                                  {"info", app::add_info(program)},
                                                                  {"demo", app::add_demo(program)},
                                                                  {"eval", app::add_eval(program)},
                                                                  {"tune", app::add_tune(program)},
                                                                  {"bench", app::add_bench(program)},
                                                                  {"plugin-path", app::add_plugin_path(program)}};
    program.add_subcommand("version", "print the version");

    std::string words;
    try {
        program.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
        fmt::print("{}", chosen_command(program, words)->help());
        return 0;
    } catch (const CLI::ParseError& error) {
        std::string text = error.what();
        for (char& c : text) { // CLI11 lists several complaints on lines of their own
            c = c == '\n' ? ' ' : c;
        }
        chosen_command(program, words);
        throw llm::UsageError(fmt::format("{}; see {} --help", text, words));
    }
    if (show_version || program.got_subcommand("version")) {
        fmt::print("{}", version());
        return 0;
    }
    for (const auto& [name, command] : commands) {
        if (program.got_subcommand(name)) {
            return command();
        }
    }
    fmt::print("{}", program.help());
    return 0;
}

} // namespace

int main(int argc, char** argv) {
    int status = kFailed;
    try {
        status = run(argc, argv);
    } catch (const llm::UsageError& error) {
        app::print_error(error.what());
        status = kUsage;
    } catch (const std::bad_alloc&) {
        app::print_error("out of memory; use a smaller --ctx, fewer bits (--kv tq3) or a smaller model");
    } catch (const std::exception& error) {
        app::print_error(error.what());
    }
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
        app::print_error("standard output: cannot be written; check the disk or the pipe");
        status = status == 0 ? kFailed : status;
    }
    return status;
}
