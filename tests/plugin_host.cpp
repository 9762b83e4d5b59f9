#include "plugin_host.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ; // POSIX

namespace tqtest {

std::string environment(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? std::string() : std::string(value);
}

void set_cache(const Cache& cache) {
    setenv("TURBOQUANT_KV", cache.kv.c_str(), 1);
    setenv("TURBOQUANT_WINDOW", std::to_string(cache.window).c_str(), 1);
    setenv("TURBOQUANT_SINKS", std::to_string(cache.sinks).c_str(), 1);
    setenv("TURBOQUANT_SINK_SEQUENCES", std::to_string(cache.sink_sequences).c_str(), 1);
    setenv("TURBOQUANT_CALIBRATE", cache.calibrate ? "on" : "off", 1);
    if (cache.profile.empty()) {
        unsetenv("TURBOQUANT_PROFILE");
    } else {
        setenv("TURBOQUANT_PROFILE", cache.profile.c_str(), 1);
    }
}

namespace {

LogCapture* g_capture = nullptr;

// The hosts' chatter would bury a failing test; warnings and errors stay.
void log_quietly(ggml_log_level level, const char* text, void*) {
    if (g_capture != nullptr && std::strstr(text, "turboquant: ") != nullptr) {
        g_capture->add(text);
        return;
    }
    static const bool verbose = !environment("TQ_TEST_VERBOSE").empty();
    if (verbose) {
        std::fputs(text, stderr);
        return;
    }
    static bool continuing = false;
    const bool expected = std::strstr(text, "full-size SWA cache") != nullptr;
    if (level == GGML_LOG_LEVEL_CONT ? continuing : level >= GGML_LOG_LEVEL_WARN && !expected) {
        std::fputs(text, stderr);
        continuing = true;
    } else if (level != GGML_LOG_LEVEL_CONT) {
        continuing = false;
    }
}

void start_host() {
    static const bool once = [] {
        llama_log_set(log_quietly, nullptr);
        llama_backend_init();
        return true;
    }();
    (void)once;
}

} // namespace

LogCapture::LogCapture() {
    start_host();
    g_capture = this;
}
LogCapture::~LogCapture() {
    g_capture = nullptr;
}
void LogCapture::add(const char* text) {
    lines_.emplace_back(text);
}
int LogCapture::count(const std::vector<std::string>& words) const {
    return static_cast<int>(std::count_if(lines_.begin(), lines_.end(), [&](const std::string& line) {
        return std::all_of(words.begin(), words.end(),
                           [&](const std::string& w) { return line.find(w) != std::string::npos; });
    }));
}

ggml_backend_dev_t plugin_device() {
    static const ggml_backend_dev_t device = [] {
        start_host();
        const std::string path = environment("TQ_TEST_PLUGIN");
        ggml_backend_dev_t found = nullptr;
        if (ggml_backend_load(path.c_str()) != nullptr) {
            found = ggml_backend_dev_by_name("TQ0");
        }
        return found;
    }();
    EXPECT_NE(device, nullptr) << "no device TQ0 after loading TQ_TEST_PLUGIN=" << environment("TQ_TEST_PLUGIN");
    return device;
}

Model load_model(const std::string& path, Host host, bool no_alloc) {
    start_host();
    llama_model_params params = llama_model_default_params();
    ggml_backend_dev_t devices[2] = {nullptr, nullptr};
    params.n_gpu_layers = 0;
    params.use_extra_bufts = false; // repacked weights would differ from one device to the other
    if (host == Host::plugin) {
        devices[0] = plugin_device();
        if (devices[0] == nullptr) {
            return {};
        }
        params.n_gpu_layers = 999;
    }
    params.devices = devices;
    params.no_alloc = no_alloc;
    if (no_alloc) {
        params.load_mode = LLAMA_LOAD_MODE_NONE;
    }
    return Model(llama_model_load_from_file(path.c_str(), params));
}

Model load_tiny(const std::string& name, Host host) {
    Model model = load_model(environment("TQ_TEST_TINY") + "/" + name + ".gguf", host);
    EXPECT_NE(model, nullptr) << name << " does not load";
    return model;
}

Context make_context(llama_model* model, const Shape& shape, const Cache& cache) {
    set_cache(cache);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = shape.n_ctx;
    params.n_batch = std::max(shape.n_ubatch, shape.n_ctx);
    params.n_ubatch = shape.n_ubatch;
    params.n_seq_max = shape.n_seq_max;
    params.kv_unified = shape.unified;
    params.swa_full = shape.swa_full;
    params.type_k = shape.type;
    params.type_v = shape.type;
    params.n_threads = shape.threads;
    params.n_threads_batch = shape.threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.offload_kqv = true;
    params.no_perf = true;
    return Context(llama_init_from_model(model, params));
}

Tokens random_tokens(int n, int vocabulary, uint32_t seed) {
    Tokens tokens(static_cast<size_t>(n));
    uint64_t state = seed * 0x9e3779b97f4a7c15ULL + 1;
    for (llama_token& token : tokens) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        token = static_cast<llama_token>((state >> 33) % static_cast<uint64_t>(vocabulary));
    }
    return tokens;
}

int vocabulary_of(const llama_model* model) {
    return llama_vocab_n_tokens(llama_model_get_vocab(model));
}

Tokens tokenize(const llama_model* model, const std::string& text, bool special) {
    const llama_vocab* vocab = llama_model_get_vocab(model);
    Tokens tokens(text.size() + 8);
    const int n = llama_tokenize(vocab, text.c_str(), static_cast<int32_t>(text.size()), tokens.data(),
                                 static_cast<int32_t>(tokens.size()), special, true);
    tokens.resize(static_cast<size_t>(std::max(n, 0)));
    return tokens;
}

std::string text_of(const llama_model* model, const Tokens& tokens) {
    std::string text;
    for (const llama_token token : tokens) {
        char piece[256];
        const int n = llama_token_to_piece(llama_model_get_vocab(model), token, piece, sizeof piece, 0, false);
        text.append(piece, static_cast<size_t>(std::max(n, 0)));
    }
    return text;
}

namespace {

struct Batch {
    explicit Batch(int capacity) : batch(llama_batch_init(capacity, 0, 1)) {}
    ~Batch() { llama_batch_free(batch); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    void add(llama_token token, llama_pos position, llama_seq_id sequence, bool output) {
        const int i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = output ? 1 : 0;
    }

    llama_batch batch;
};

void append_logits(llama_context* context, int index, Logits& out) {
    const int vocabulary = vocabulary_of(llama_get_model(context));
    const float* row = llama_get_logits_ith(context, index);
    out.insert(out.end(), row, row + vocabulary);
}

} // namespace

Logits decode(llama_context* context, const Tokens& tokens, const Feed& feed) {
    const int n = static_cast<int>(tokens.size());
    const int chunk = feed.chunk > 0 ? feed.chunk : n;
    Logits logits;
    for (int begin = 0; begin < n; begin += chunk) {
        const int end = std::min(n, begin + chunk);
        Batch b(end - begin);
        for (int i = begin; i < end; ++i) {
            b.add(tokens[static_cast<size_t>(i)], feed.begin + i, feed.sequence, true);
        }
        if (llama_decode(context, b.batch) != 0) {
            return {};
        }
        for (int i = 0; i < end - begin; ++i) {
            append_logits(context, i, logits);
        }
    }
    return logits;
}

std::vector<Logits> decode_together(llama_context* context, const std::vector<Tokens>& sequences, int per_sequence) {
    std::vector<Logits> logits(sequences.size());
    std::vector<size_t> done(sequences.size(), 0);
    for (;;) {
        Batch b(per_sequence * static_cast<int>(sequences.size()));
        std::vector<size_t> owner;
        for (size_t s = 0; s < sequences.size(); ++s) {
            for (int i = 0; i < per_sequence && done[s] < sequences[s].size(); ++i, ++done[s]) {
                b.add(sequences[s][done[s]], static_cast<llama_pos>(done[s]), static_cast<llama_seq_id>(s), true);
                owner.push_back(s);
            }
        }
        if (owner.empty()) {
            return logits;
        }
        if (llama_decode(context, b.batch) != 0) {
            return {};
        }
        for (size_t i = 0; i < owner.size(); ++i) {
            append_logits(context, static_cast<int>(i), logits[owner[i]]);
        }
    }
}

Tokens generate(llama_context* context, const Tokens& prompt, int n, const Feed& feed) {
    const llama_model* model = llama_get_model(context);
    const int vocabulary = vocabulary_of(model);
    Tokens answer;
    Tokens next = prompt;
    llama_pos position = feed.begin;
    for (int i = 0; i <= n; ++i) {
        Batch b(static_cast<int>(next.size()));
        for (size_t t = 0; t < next.size(); ++t) {
            b.add(next[t], position++, feed.sequence, t + 1 == next.size());
        }
        if (i == n || llama_decode(context, b.batch) != 0) {
            break;
        }
        const float* row = llama_get_logits_ith(context, -1);
        const auto best = static_cast<llama_token>(std::max_element(row, row + vocabulary) - row);
        if (llama_vocab_is_eog(llama_model_get_vocab(model), best)) {
            break;
        }
        answer.push_back(best);
        next = {best};
    }
    return answer;
}

bool all_finite(const Logits& logits) {
    return std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
}

Difference compare(const Logits& a, const Logits& reference, int vocabulary) {
    Difference d;
    EXPECT_EQ(a.size(), reference.size());
    EXPECT_FALSE(reference.empty());
    EXPECT_TRUE(all_finite(a));
    if (a.size() != reference.size() || a.empty() || !all_finite(a)) {
        d.relative = d.mean_kld = d.max_kld = INFINITY;
        return d;
    }
    const auto v = static_cast<size_t>(vocabulary);
    const size_t rows = a.size() / v;
    double error = 0;
    double power = 0;
    for (size_t r = 0; r < rows; ++r) {
        const float* x = a.data() + r * v;
        const float* y = reference.data() + r * v;
        double mean = 0;
        for (size_t i = 0; i < v; ++i) {
            mean += y[i];
        }
        mean /= static_cast<double>(v);
        const double top_x = *std::max_element(x, x + v);
        const double top_y = *std::max_element(y, y + v);
        double sum_x = 0;
        double sum_y = 0;
        for (size_t i = 0; i < v; ++i) {
            error += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
            power += (y[i] - mean) * (y[i] - mean);
            sum_x += std::exp(x[i] - top_x);
            sum_y += std::exp(y[i] - top_y);
        }
        double kld = 0;
        for (size_t i = 0; i < v; ++i) {
            const double log_x = x[i] - top_x - std::log(sum_x);
            const double log_y = y[i] - top_y - std::log(sum_y);
            kld += std::exp(log_y) * (log_y - log_x);
        }
        d.mean_kld += kld / static_cast<double>(rows);
        d.max_kld = std::max(d.max_kld, kld);
        d.same_top +=
            (std::max_element(x, x + v) - x == std::max_element(y, y + v) - y) ? 1.0 / static_cast<double>(rows) : 0;
    }
    d.relative = std::sqrt(error / power);
    return d;
}

std::vector<uint8_t> sequence_state(llama_context* context, llama_seq_id sequence) {
    std::vector<uint8_t> state(llama_state_seq_get_size(context, sequence));
    state.resize(llama_state_seq_get_data(context, state.data(), state.size(), sequence));
    return state;
}

bool restore_sequence(llama_context* context, llama_seq_id sequence, const std::vector<uint8_t>& state) {
    return llama_state_seq_set_data(context, state.data(), state.size(), sequence) != 0;
}

std::vector<uint8_t> whole_state(llama_context* context) {
    std::vector<uint8_t> state(llama_state_get_size(context));
    state.resize(llama_state_get_data(context, state.data(), state.size()));
    return state;
}

bool map_state(const std::vector<uint8_t>& state, StateMap& map) {
    size_t at = 0;
    bool good = true;
    auto take = [&](auto& value) {
        if (at + sizeof value > state.size()) {
            good = false;
            value = {};
            return;
        }
        std::memcpy(&value, state.data() + at, sizeof value);
        at += sizeof value;
    };
    map = {};
    uint32_t magic = 0;
    llama_seq_id sequence = 0;
    uint32_t streams = 0;
    uint32_t cells = 0;
    take(magic);
    take(sequence);
    take(streams);
    // One stream per sequence: those before the sequence's own say "no cells".
    for (uint32_t s = 0; good && s < streams && cells == 0; ++s) {
        take(cells);
    }
    for (uint32_t i = 0; good && i < cells; ++i) {
        llama_pos position = 0;
        uint32_t sequences = 0;
        take(position);
        take(sequences);
        at += sequences * sizeof(llama_seq_id);
        map.positions.push_back(position);
    }
    uint32_t transposed = 1;
    uint32_t layers = 0;
    take(transposed);
    take(layers);
    for (int side = 0; good && transposed == 0 && side < 2; ++side) {
        for (uint32_t l = 0; good && l < layers; ++l) {
            int32_t type = 0;
            uint64_t row_bytes = 0;
            take(type);
            take(row_bytes);
            (side == 0 ? map.keys : map.values).push_back({at, static_cast<size_t>(row_bytes)});
            at += static_cast<size_t>(row_bytes) * cells;
        }
    }
    good = good && transposed == 0 && cells > 0 && at <= state.size();
    EXPECT_TRUE(good) << "the state is not laid out as expected (" << streams << " streams, " << cells << " cells, "
                      << layers << " layers, " << at << " of " << state.size() << " bytes)";
    return good;
}

Outcome run_program(const std::vector<std::string>& command, const std::vector<std::string>& extra, int seconds) {
    Outcome run;
    std::vector<std::string> variables;
    for (char** entry = environ; *entry != nullptr; ++entry) {
        const std::string line = *entry;
        const std::string name = line.substr(0, line.find('='));
        const bool replaced = std::any_of(extra.begin(), extra.end(),
                                          [&](const std::string& e) { return e.substr(0, e.find('=')) == name; });
        if (!replaced) {
            variables.push_back(line);
        }
    }
    for (const std::string& e : extra) {
        if (e.find('=') != std::string::npos) {
            variables.push_back(e);
        }
    }
    std::vector<char*> argv;
    std::vector<char*> envp;
    for (const std::string& c : command) {
        argv.push_back(const_cast<char*>(c.c_str()));
    }
    for (const std::string& v : variables) {
        envp.push_back(const_cast<char*>(v.c_str()));
    }
    argv.push_back(nullptr);
    envp.push_back(nullptr);

    int out[2];
    int err[2];
    if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) {
        run.status = -1;
        return run;
    }
    const pid_t child = fork();
    if (child == 0) {
        dup2(out[1], STDOUT_FILENO);
        dup2(err[1], STDERR_FILENO);
        execve(argv[0], argv.data(), envp.data());
        _exit(127);
    }
    close(out[1]);
    close(err[1]);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    pollfd fds[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
    std::string* texts[2] = {&run.out, &run.err};
    bool killed = false;
    for (int open = 2; open > 0;) {
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        if (left.count() <= 0 && !killed) {
            kill(child, SIGKILL);
            killed = true;
            run.err += "\n[killed after " + std::to_string(seconds) + " s]\n";
        }
        if (poll(fds, 2, killed ? 1000 : static_cast<int>(std::max<int64_t>(left.count(), 1))) < 0 && errno != EINTR) {
            break;
        }
        for (int i = 0; i < 2; ++i) {
            if (fds[i].fd < 0 || fds[i].revents == 0) {
                continue;
            }
            char text[65536];
            const ssize_t n = read(fds[i].fd, text, sizeof text);
            if (n > 0) {
                texts[i]->append(text, static_cast<size_t>(n));
            } else {
                close(fds[i].fd);
                fds[i].fd = -1;
                --open;
            }
        }
    }
    int status = 0;
    waitpid(child, &status, 0);
    run.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return run;
}

} // namespace tqtest
