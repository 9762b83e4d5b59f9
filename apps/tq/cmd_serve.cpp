// tq serve: an OpenAI-compatible server with continuous batching.
#include "commands.h"
#include "options.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/sysinfo.h"
#include "llm/tuning.h"
#include "serve/engine/folder_store.h"
#include "serve/http/auth.h"
#include "serve/http/server.h"

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <memory>
#include <mutex>
#include <thread>

#include <malloc.h>
#include <unistd.h>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

constexpr int kMostSlots = 64;
constexpr int kDefaultSlots = 8;
constexpr int kSpareThreads = 32; // for connections beyond those that wait for an answer

struct ServeFlags {
    ModelFlags model;
    llm::SamplingFlags sampling;
    serve::ServerOptions server;
    std::optional<int> parallel;
    std::optional<uint64_t> kv_bytes;
    int64_t queue = 64;
    int64_t limit = -1;
    int64_t timeout = 600;
    int64_t drain = 30;
    std::string session_dir;
    uint64_t session_limit = uint64_t{8} << 30;
    std::string key_file;
    std::string alias;
    std::string log_format = "text";
    bool log_prompts = false;
};

// SIGTERM and SIGINT, taken by a thread of their own: all others have them blocked.
class Signals {
public:
    Signals() {
        sigemptyset(&set_);
        sigaddset(&set_, SIGTERM);
        sigaddset(&set_, SIGINT);
        pthread_sigmask(SIG_BLOCK, &set_, nullptr);
        std::signal(SIGPIPE, SIG_IGN); // a client that goes is an error of write()
        thread_ = std::thread([this] { run(); });
    }
    ~Signals() {
        over_ = true;
        thread_.join();
    }
    Signals(const Signals&) = delete;
    Signals& operator=(const Signals&) = delete;

    // From here on the first signal means: finish what is running. Before, there is nothing to finish.
    void wait() {
        std::unique_lock lock(mutex_);
        serving_ = true;
        changed_.wait(lock, [&] { return came_; });
    }

private:
    void run() {
        const timespec turn = {0, 100'000'000};
        while (!over_) {
            const int signal = sigtimedwait(&set_, nullptr, &turn);
            if (signal < 0) {
                continue;
            }
            const std::lock_guard lock(mutex_);
            if (!serving_ || (came_ && signal == SIGINT)) {
                ::_exit(128 + signal);
            }
            came_ = true;
            changed_.notify_all();
        }
    }

    sigset_t set_ = {};
    std::mutex mutex_;
    std::condition_variable changed_;
    bool serving_ = false;
    bool came_ = false;
    std::atomic<bool> over_{false};
    std::thread thread_;
};

void check(const ServeFlags& flags) {
    check_flags(flags.model);
    check_flags(flags.sampling);
    check_range("--port", flags.server.port, 0, 65535);
    check_range("--parallel", flags.parallel.value_or(1), 1, kMostSlots);
    check_range("--queue", flags.queue, 0, 1000);
    check_range("--timeout", flags.timeout, 1, 1'000'000);
    check_range("--drain", flags.drain, 0, 1'000'000);
    check_range("-n", flags.limit, -1, 1'000'000'000);
    check_range("--body-limit", static_cast<int64_t>(flags.server.body_limit), 1024, int64_t{1} << 30);
    if (flags.log_format != "text" && flags.log_format != "json" && flags.log_format != "none") {
        throw llm::UsageError(fmt::format("--log-format {}: use text, json or none", flags.log_format));
    }
    for (const std::string& key : flags.server.keys) {
        if (key.empty()) {
            throw llm::UsageError("--api-key '': the key is empty; give one");
        }
    }
}

// How many conversations are held at once: those asked for, else as many as the bytes and the memory allow. Error with the
// numbers when what was asked for does not fit.
int choose_slots(const ServeFlags& flags, const llm::ModelPlan& model, const llm::CachePlan& plan,
                 const llm::KvChoice& kv) {
    const int64_t slot_bytes = llm::kv_bytes(plan, kv) + plan.recurrent_bytes;
    int most = flags.parallel.value_or(flags.kv_bytes ? kMostSlots : kDefaultSlots);
    if (flags.kv_bytes) {
        const auto budget = static_cast<int64_t>(*flags.kv_bytes);
        const int64_t fitting = budget / std::max<int64_t>(1, slot_bytes);
        if (fitting < flags.parallel.value_or(1)) {
            throw llm::Error(
                fmt::format("--kv-bytes {}: a conversation of {} tokens takes {} with the {} cache, so {} fit; use "
                            "a smaller --ctx{}, fewer bits (--kv tq3) or more bytes",
                            llm::format_bytes(budget), llm::format_count(plan.context), llm::format_bytes(slot_bytes),
                            kv.name, fitting, flags.parallel ? ", a smaller --parallel" : ""));
        }
        most = static_cast<int>(std::min<int64_t>(most, fitting));
    }
    const llm::FreeMemory memory = llm::free_memory();
    const auto fits = [&](int slots) { return memory.bytes < 0 || model.total_bytes(plan, kv, slots) <= memory.bytes; };
    if (fits(most)) {
        return most;
    }
    llm::check_fit(model, plan, kv); // not even one: says so
    int fitting = most;
    while (fitting > 1 && !fits(fitting)) {
        --fitting;
    }
    if (flags.parallel) {
        throw llm::Error(fmt::format(
            "--parallel {}: {} conversations of {} tokens need {} with the {} cache, {} leaves {}; "
            "use --parallel {} or a smaller --ctx",
            most, most, llm::format_count(plan.context), llm::format_bytes(model.total_bytes(plan, kv, most)), kv.name,
            memory.source, llm::format_bytes(memory.bytes), fitting));
    }
    return fitting;
}

int run_server(ServeFlags flags) {
    if (flags.model.json) {
        flags.log_format = "json";
    }
    check(flags);
    llm::KvChoice kv = choose_kv(flags.model);
    llm::install_log(flags.model.verbose);
    // A thread for each connection would have a heap of its own each; few are enough, and memory stays flat.
    mallopt(M_ARENA_MAX, 4);
    if (!flags.key_file.empty()) {
        for (std::string& key : serve::read_key_file(flags.key_file)) {
            flags.server.keys.push_back(std::move(key));
        }
    }
    const std::string path = llm::resolve_model_path(flags.model.model);
    const llm::ProfileFlags profile_flags = choose_profile(flags.model.profile);
    const llm::ModelPlan model_plan(path);
    const llm::CachePlan plan = model_plan.plan(llm::choose_context(model_plan, flags.model.context));
    llm::find_profile(path, profile_flags, plan, kv, {}); // what is wrong shows before anything else happens
    const int slots = choose_slots(flags, model_plan, plan, kv);
    const std::string file = std::filesystem::path(path).filename().string();

    serve::RequestLog log(flags.log_format == "json"   ? serve::RequestLog::Format::json
                          : flags.log_format == "none" ? serve::RequestLog::Format::none
                                                       : serve::RequestLog::Format::text);
    serve::Metrics metrics;
    Signals signals;
    flags.server.threads = slots + static_cast<int>(flags.queue) + kSpareThreads;
    serve::Server server(flags.server, metrics, log);
    server.start();
    if (flags.server.keys.empty() && !serve::is_loopback(flags.server.host)) {
        log.notice(
            fmt::format("{}: open to the network without an API key; --api-key-file asks for one", server.url()));
    }

    const llm::Model model = llm::Model::load(path, kv.turboquant(), progress("loading " + file));
    llm::TuneOptions tuning;
    tuning.hurry = true;
    tuning.threads = flags.model.threads;
    tuning.progress = progress("measuring the keys of " + file);
    const std::unique_ptr<llm::TemporaryProfile> profile = llm::prepare_profile(
        model, model_plan, profile_flags, tuning, kv, [&](const std::string& line) { log.notice(line); });
    const llm::ChatTemplate chat_template(model);
    serve::EngineOptions options;
    options.kv = kv;
    options.plan = plan;
    options.slots = slots;
    options.threads = flags.model.threads;
    options.queue = flags.queue;
    std::unique_ptr<serve::FolderStore> sessions;
    if (!flags.session_dir.empty()) {
        sessions = std::make_unique<serve::FolderStore>(flags.session_dir, llm::session_origin(model, kv),
                                                        static_cast<int64_t>(flags.session_limit),
                                                        [&](const std::string& line) { log.notice(line); });
        options.store = sessions.get();
    }
    serve::Engine engine(model, options, metrics);
    const serve::Service service = {.model = model,
                                    .chat_template = chat_template,
                                    .engine = engine,
                                    .kv = kv,
                                    .defaults = llm::resolve_sampling(flags.sampling, model),
                                    .name =
                                        flags.alias.empty() ? std::filesystem::path(path).stem().string() : flags.alias,
                                    .most_tokens = flags.limit,
                                    .longest_piece = serve::longest_piece(model),
                                    .timeout = std::chrono::seconds(flags.timeout),
                                    .created = std::time(nullptr),
                                    .log_prompts = flags.log_prompts};
    server.ready(service);
    if (chat_template.kind() == llm::ChatTemplate::Kind::chatml) {
        log.notice("the model's chat template is unknown to libllama: using ChatML, answers may suffer");
    }
    const serve::EngineStatus status = engine.status();
    log.notice(fmt::format("{} answers at {}: {} conversations of {} tokens, {} cache, KV {} ({} in f16)", service.name,
                           server.url(), status.slots, llm::format_count(status.context), kv.name,
                           llm::format_bytes(status.kv_bytes), llm::format_bytes(status.kv_f16_bytes)));
    signals.wait();
    log.notice(
        fmt::format("shutting down: finishing what is running, at most {} s; Ctrl-C again ends at once", flags.drain));
    engine.drain(serve::Clock::now() + std::chrono::seconds(flags.drain));
    if (sessions != nullptr) {
        sessions->flush();
        const llm::SessionFolder::Contents kept = sessions->contents();
        log.notice(fmt::format("{}: {} sessions, {}", flags.session_dir, kept.files, llm::format_bytes(kept.bytes)));
    }
    server.stop();
    return 0;
}

} // namespace

Command add_serve(CLI::App& program) {
    auto flags = std::make_shared<ServeFlags>();
    CLI::App* command =
        program.add_subcommand("serve", "an OpenAI-compatible server: many conversations at once, and a web page");
    command->add_option("--host", flags->server.host, "address to listen on (default 127.0.0.1)")->type_name("ADDRESS");
    command->add_option("--port", flags->server.port, "port; 0: any free one (default 8080)")->type_name("N");
    command
        ->add_option("--parallel", flags->parallel,
                     "conversations answered at once, --ctx tokens each (default: 8, fewer where memory is short)")
        ->type_name("N");
    command
        ->add_option("--kv-bytes", flags->kv_bytes,
                     "memory for all KV caches, as in 2GB or 512MB: so many conversations as fit")
        ->type_name("SIZE")
        ->transform(CLI::AsSizeValue(false));
    command->add_option("--queue", flags->queue, "requests that may wait; more are turned away with 429 (default 64)")
        ->type_name("N");
    command->add_option("--timeout", flags->timeout, "longest a request may take, waiting included (default 600)")
        ->type_name("SECONDS");
    command->add_option("--drain", flags->drain, "at SIGTERM or Ctrl-C, time to finish running answers (default 30)")
        ->type_name("SECONDS");
    command->add_option("-n", flags->limit, "most tokens of any answer; -1: until the context is full (default)")
        ->type_name("N");
    command->add_option("--body-limit", flags->server.body_limit, "largest request body (default 8MB)")
        ->type_name("SIZE")
        ->transform(CLI::AsSizeValue(false));
    command
        ->add_option("--session-dir", flags->session_dir,
                     "folder that keeps conversations' compressed caches over restarts; made for you only")
        ->type_name("DIR");
    command
        ->add_option("--session-dir-limit", flags->session_limit,
                     "bytes of all files there; the least recently used go first (default 8GB)")
        ->type_name("SIZE")
        ->transform(CLI::AsSizeValue(false));
    command->add_option("--api-key", flags->server.keys, "key that requests must bring; others see it in ps")
        ->type_name("KEY");
    command->add_option("--api-key-file", flags->key_file, "file with one key a line, readable by you only")
        ->type_name("FILE");
    command
        ->add_option("--cors-origin", flags->server.cors_origin,
                     "let pages of this origin use the server, as in https://example.org; '*': all (default: none)")
        ->type_name("ORIGIN");
    command->add_option("--alias", flags->alias, "the model's name in answers (default: its file's)")
        ->type_name("NAME");
    command->add_option("--log-format", flags->log_format, "lines about requests: text, json or none (default text)")
        ->type_name("FORMAT");
    command->add_flag("--log-prompts", flags->log_prompts, "write prompts into these lines");
    add_sampling_flags(*command, flags->sampling);
    add_model_flags(*command, flags->model);
    return [flags] { return run_server(*flags); };
}

} // namespace turboquant::app
