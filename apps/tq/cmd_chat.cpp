// tq chat: a conversation, with commands that start with a slash.
#include "commands.h"
#include "line_editor.h"
#include "options.h"
#include "report.h"
#include "start.h"
#include "terminal.h"

#include "llm/conversation.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/utf8.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

constexpr const char* kHelp = R"(/help             this list
/reset            forget the conversation (the system message stays)
/system [TEXT]    start over with this system message; without TEXT: with none
/regen            another answer to the last question
/stats            cache, context and settings
/set NAME VALUE   temp, top-k, top-p, min-p, seed, n
/save FILE        keep the conversation and its cache
/load FILE        go on with a saved one
/quit             leave (as Ctrl-D does)
A line that ends in \ goes on in the next; """ opens and closes a text of several lines.
Ctrl-C stops an answer; what was said of it stays in the conversation.
)";
constexpr const char* kBlock = "\"\"\"";

struct ChatFlags {
    ModelFlags model;
    AnswerFlags answer;
    std::string session;
};

class Chat {
public:
    Chat(const ChatFlags& flags, Engine& engine)
        : flags_(flags),
          engine_(engine),
          conversation_(*engine.session),
          editor_(history_path()),
          prompt_(editor_.interactive() ? "> " : "") {
        conversation_.set_system(flags_.answer.system.value_or(conversation_.chat_template().default_system()));
    }

    int loop();

private:
    std::optional<std::string> next_input();
    void command(const std::string& text);
    void ask(const std::string* text);
    void show_stats() const;
    void load_session();
    void save_session();

    ChatFlags flags_;
    Engine& engine_;
    llm::Conversation conversation_;
    LineEditor editor_;
    std::string prompt_;
    bool quit_ = false;
    bool failed_ = false;
    bool changed_ = false; // since --session's file was read
    std::optional<llm::Answer> last_;
};

// A line, or several as one text; nothing at the end of input.
std::optional<std::string> Chat::next_input() {
    std::string text;
    std::string line;
    bool block = false;
    bool more = false;
    for (;;) {
        const auto result = editor_.read(block || more ? (prompt_.empty() ? "" : ". ") : prompt_, line);
        if (result == LineEditor::Result::interrupted) {
            take_interrupt();
            if (termination_requested()) {
                return std::nullopt;
            }
            text.clear();
            block = more = false;
            continue;
        }
        if (result == LineEditor::Result::end) {
            if (termination_requested()) {
                return std::nullopt; // half a text is no question
            }
            return block || more ? std::optional<std::string>(text) : std::nullopt;
        }
        editor_.remember(line);
        if (!line.empty() && line.back() == '\r') {
            line.pop_back();
        }
        if (block) {
            if (const size_t end = line.find(kBlock); end != std::string::npos) {
                return text + line.substr(0, end);
            }
            text += line + "\n";
            continue;
        }
        if (!more && line.rfind(kBlock, 0) == 0) {
            const std::string rest = line.substr(3);
            if (const size_t end = rest.find(kBlock); end != std::string::npos) {
                return rest.substr(0, end);
            }
            block = true;
            text = rest.empty() ? "" : rest + "\n";
            continue;
        }
        more = !line.empty() && line.back() == '\\';
        if (more) {
            line.back() = '\n';
        }
        text += line;
        if (!more) {
            return text;
        }
    }
}

// text: null for another answer to the last question.
void Chat::ask(const std::string* text) {
    llm::AskOptions options;
    options.sampling = resolve_sampling(flags_.answer.sampling, engine_.model);
    options.limit = flags_.answer.limit;
    options.make_room = true;
    options.progress = progress("reading the prompt");
    bool line_open = false;
    if (!flags_.model.json) {
        options.on_text = [&](const std::string& part) {
            std::fputs(part.c_str(), stdout);
            std::fflush(stdout);
            line_open = part.back() != '\n';
        };
    }
    options.on_notice = [&](const std::string& notice) {
        if (line_open && editor_.interactive()) {
            std::fputs("\n", stderr);
        }
        print_note(notice);
    };
    take_interrupt();
    changed_ = true;
    const llm::Answer answer = text != nullptr ? conversation_.ask(*text, options) : conversation_.regenerate(options);
    take_interrupt();
    last_ = answer;
    if (flags_.model.json) {
        const nlohmann::json root = {{"answer", answer.text},
                                     {"stop", llm::stop_name(answer.stop)},
                                     {"seed", options.sampling.seed},
                                     {"stats", stats_json(answer.stats)}};
        fmt::print("{}\n", root.dump());
    } else {
        std::fputs(line_open || !editor_.interactive() ? "\n" : "", stdout);
    }
    std::fflush(stdout);
    if (answer.stop == llm::Stop::interrupted && answer.stats.prompt_tokens == 0) {
        print_note("stopped while reading the prompt; the question was taken back");
    } else {
        print_note(stats_line(answer, flags_.answer.limit));
    }
}

void Chat::show_stats() const {
    const llm::Session& session = *engine_.session;
    print_note(fmt::format("model    {}", engine_.model.identity()));
    print_note(
        fmt::format("cache    {}; {}", engine_.kv.describe(), kv_words(session.kv_bytes(), session.kv_f16_bytes())));
    print_note(fmt::format("context  {} of {} tokens, {} messages", session.cached().size(), session.context_size(),
                           conversation_.messages().size()));
    const llm::SamplingOptions sampling = resolve_sampling(flags_.answer.sampling, engine_.model);
    print_note(fmt::format(
        "answers  temp {}, top-k {}, top-p {}, min-p {}, seed {}, n {}", sampling.temp, sampling.top_k, sampling.top_p,
        sampling.min_p, flags_.answer.sampling.seed ? std::to_string(sampling.seed) : "random", flags_.answer.limit));
    if (last_) {
        print_note("last     " + stats_line(*last_, flags_.answer.limit));
    }
}

void Chat::command(const std::string& text) {
    const size_t space = text.find_first_of(" \t");
    const std::string name = text.substr(0, space);
    std::string rest = space == std::string::npos ? "" : text.substr(space);
    rest.erase(0, rest.find_first_not_of(" \t"));
    rest.erase(rest.find_last_not_of(" \t\n") + 1);
    const auto need = [&](const char* what) {
        if (rest.empty()) {
            throw llm::UsageError(fmt::format("{}: give {}", name, what));
        }
    };
    if (name == "/help") {
        std::fputs(kHelp, stderr);
    } else if (name == "/reset") {
        changed_ = true;
        conversation_.reset();
        print_note("forgotten");
    } else if (name == "/system") {
        changed_ = true;
        conversation_.set_system(rest);
        print_note(rest.empty() ? "started over without a system message" : "started over with this system message");
    } else if (name == "/regen") {
        ask(nullptr);
    } else if (name == "/stats") {
        show_stats();
    } else if (name == "/set") {
        need("a name and a value, as in /set temp 0.7");
        const size_t gap = rest.find_first_of(" \t=");
        const size_t value = gap == std::string::npos ? gap : rest.find_first_not_of(" \t=", gap);
        if (value == std::string::npos) {
            throw llm::UsageError(fmt::format("/set {}: give a value too, as in /set temp 0.7", rest));
        }
        set_answer_flag(flags_.answer, rest.substr(0, gap), rest.substr(value));
        print_note(fmt::format("{} is {} now", rest.substr(0, gap), rest.substr(value)));
    } else if (name == "/save") {
        need("a file, as in /save talk.tqchat");
        conversation_.save(rest);
        print_note(fmt::format("saved to {}", rest));
    } else if (name == "/load") {
        need("a file that /save wrote");
        print_note(conversation_.load(rest));
        changed_ = true;
    } else if (name == "/quit" || name == "/exit") {
        quit_ = true;
    } else {
        throw llm::UsageError(fmt::format("{}: unknown; /help lists the commands", name));
    }
}

// A file that is there and cannot be continued is an error before anything is asked: leaving would overwrite it.
void Chat::load_session() {
    std::error_code failed;
    if (!std::filesystem::exists(flags_.session, failed)) {
        if (failed) {
            throw llm::Error(fmt::format("{}: cannot be opened: {}; check the path", flags_.session, failed.message()));
        }
        return;
    }
    print_note(conversation_.load(flags_.session));
    if (flags_.answer.system) {
        print_note("--system: the session has its own beginning; /system starts over with another");
    }
}

void Chat::save_session() {
    if (!flags_.session.empty() && changed_) {
        conversation_.save(flags_.session);
        print_note(fmt::format("saved to {}", flags_.session));
    }
}

int Chat::loop() {
    if (!flags_.session.empty()) {
        load_session();
    }
    if (editor_.interactive()) {
        print_note(fmt::format("{}; {} cache, context {}. /help lists the commands.", engine_.model.identity(),
                               engine_.kv.describe(), engine_.session->context_size()));
        if (conversation_.chat_template().kind() == llm::ChatTemplate::Kind::none) {
            print_note("The model has no chat template: it continues your text rather than answering it.");
        }
    }
    if (conversation_.chat_template().kind() == llm::ChatTemplate::Kind::chatml) {
        print_note("The model's chat template is unknown to libllama: using ChatML, answers may suffer.");
    }
    while (!quit_ && !termination_requested()) {
        const std::optional<std::string> input = next_input();
        if (!input) {
            break;
        }
        if (input->find_first_not_of(" \t\r\n") == std::string::npos) {
            continue;
        }
        try {
            if (const size_t at = llm::first_invalid_utf8(*input); at != std::string::npos) {
                throw llm::Error(fmt::format("byte {} of the input is not UTF-8 text; convert it first, for example "
                                             "with iconv",
                                             at));
            }
            if (input->front() == '/') {
                command(*input);
            } else {
                ask(&*input);
            }
        } catch (const llm::Error& error) {
            print_error(error.what());
            failed_ = true;
        }
    }
    save_session();
    // A person has seen the messages; a script only sees the status.
    return failed_ && !editor_.interactive() ? 1 : 0;
}

int chat(const ChatFlags& flags) {
    check_flags(flags.model);
    check_flags(flags.answer);
    const llm::KvChoice kv = choose_kv(flags.model);
    llm::install_log(flags.model.verbose);
    catch_interrupts();
    const std::unique_ptr<Engine> engine = start(flags.model, kv);
    catch_termination(); // not before: there is nothing to save while a model is loaded
    return Chat(flags, *engine).loop();
}

} // namespace

Command add_chat(CLI::App& program) {
    auto flags = std::make_shared<ChatFlags>();
    CLI::App* command = program.add_subcommand("chat", "talk; /help lists what can be said");
    add_model_flags(*command, flags->model);
    add_answer_flags(*command, flags->answer);
    command
        ->add_option("--session", flags->session,
                     "go on with the conversation in this file, where there is one, and save it there when leaving")
        ->type_name("FILE");
    return [flags] { return chat(*flags); };
}

} // namespace turboquant::app
