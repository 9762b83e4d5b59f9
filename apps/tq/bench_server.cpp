#include "bench_server.h"

#include "llm/error.h"
#include "llm/kv_choice.h"
#include "llm/log_lines.h"
#include "llm/plugin.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ; // NOLINT(readability-redundant-declaration): POSIX leaves it to us

namespace turboquant::app {
namespace {

constexpr double kReadySeconds = 180; // a large model from a slow disk, its profile measured
constexpr double kEndSeconds = 15;

// A port that was free a moment ago.
int free_port() {
    const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    const bool bound = socket >= 0 && ::bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
                       ::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &length) == 0;
    const std::string reason = std::strerror(errno);
    if (socket >= 0) {
        ::close(socket);
    }
    if (!bound) {
        throw llm::Error(fmt::format("no free port on 127.0.0.1: {}", reason));
    }
    return ntohs(address.sin_port);
}

void sleep_seconds(double seconds) {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

} // namespace

ServerProcess::ServerProcess(const Endpoint& endpoint) : endpoint_(endpoint) {
    if (const int status = health(endpoint); status != 200) {
        throw llm::Error(status < 0
                             ? fmt::format("{}: no server answers there; start one, or leave out --url", endpoint.url)
                             : fmt::format("{}: not ready (status {} of /health); wait for it", endpoint.url, status));
    }
}

ServerProcess::ServerProcess(ServerSpec spec) : spec_(std::move(spec)) {
    const int port = free_port();
    endpoint_.url = fmt::format("http://127.0.0.1:{}", port);
    const llm::KvChoice kv = llm::parse_kv(spec_.kv);
    const std::string total = std::to_string(spec_.slots * spec_.slot_context);
    std::vector<std::string> words = {spec_.program};
    std::vector<std::string> variables;
    for (char** variable = environ; *variable != nullptr; ++variable) {
        if (std::strncmp(*variable, "TURBOQUANT_", 11) != 0 && std::strncmp(*variable, "GGML_BACKEND_PATH=", 18) != 0) {
            variables.emplace_back(*variable);
        }
    }
    if (spec_.engine == "llama-server") {
        words.insert(words.end(),
                     {"-m", spec_.model, "-c", total, "-np", std::to_string(spec_.slots), "-fa", "on", "-lv", "4"});
        if (kv.turboquant()) {
            words.insert(words.end(), {"--device", "TQ0"});
            variables.push_back("GGML_BACKEND_PATH=" + llm::find_plugin());
            variables.push_back("TURBOQUANT_KV=" + kv.bits());
            variables.push_back(fmt::format("TURBOQUANT_WINDOW={}", kv.window));
            variables.push_back(fmt::format("TURBOQUANT_SINKS={}", kv.sinks));
        } else {
            words.insert(words.end(), {"-ctk", kv.host_type, "-ctv", kv.host_type});
        }
    } else {
        words.insert(words.end(),
                     {"serve", "-m", spec_.model, "--kv", spec_.kv, "--parallel", std::to_string(spec_.slots), "--ctx",
                      std::to_string(spec_.slot_context), "--log-format", "none"});
    }
    words.insert(words.end(), {"--host", "127.0.0.1", "--port", std::to_string(port)});
    if (spec_.threads > 0) {
        words.insert(words.end(), {"--threads", std::to_string(spec_.threads)});
    }

    log_path_ = (std::filesystem::temp_directory_path() / "tq-server-XXXXXX").string();
    const int log_file = ::mkostemp(log_path_.data(), O_CLOEXEC);
    if (log_file < 0) {
        throw llm::Error(fmt::format("{}: cannot be made: {}; set TMPDIR", log_path_, std::strerror(errno)));
    }
    std::vector<char*> arguments;
    std::vector<char*> environment;
    arguments.reserve(words.size() + 1);
    environment.reserve(variables.size() + 1);
    for (std::string& word : words) {
        arguments.push_back(word.data());
    }
    for (std::string& variable : variables) {
        environment.push_back(variable.data());
    }
    arguments.push_back(nullptr);
    environment.push_back(nullptr);
    const int nothing = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    const pid_t parent = ::getpid();
    process_ = ::fork();
    if (process_ == 0) {
        // Only what is safe between fork and exec. The server ends with us, however we end.
        ::prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (::getppid() == parent && ::dup2(nothing, 0) == 0 && ::dup2(log_file, 1) == 1 && ::dup2(log_file, 2) == 2) {
            ::execve(arguments.front(), arguments.data(), environment.data());
            static constexpr char kCannot[] = "error: the program cannot be executed; check its path\n";
            [[maybe_unused]] const ssize_t written = ::write(2, kCannot, sizeof kCannot - 1);
        }
        ::_exit(127);
    }
    const std::string reason = std::strerror(errno);
    ::close(log_file);
    ::close(nothing);
    if (process_ < 0) {
        stop();
        throw llm::Error(fmt::format("{}: cannot be started: {}", spec_.program, reason));
    }
    const double end = now_seconds() + kReadySeconds;
    while (health(endpoint_) != 200) {
        int status = 0;
        const bool ended = ::waitpid(process_, &status, WNOHANG) == process_;
        if (ended || now_seconds() > end) {
            const std::string why = last_words();
            process_ = ended ? -1 : process_;
            stop();
            throw llm::Error(fmt::format("{} with {}: {}: {}", spec_.engine, spec_.kv,
                                         ended ? "ended before it was ready" : "not ready in time", why));
        }
        sleep_seconds(0.05);
    }
}

ServerProcess::~ServerProcess() {
    stop();
}

void ServerProcess::stop() {
    if (process_ > 0) {
        ::kill(process_, SIGTERM);
        const double end = now_seconds() + kEndSeconds;
        while (::waitpid(process_, nullptr, WNOHANG) == 0) {
            if (now_seconds() > end) {
                ::kill(process_, SIGKILL);
                ::waitpid(process_, nullptr, 0);
                break;
            }
            sleep_seconds(0.02);
        }
        process_ = -1;
    }
    if (!log_path_.empty()) {
        std::error_code ignored;
        std::filesystem::remove(log_path_, ignored);
    }
}

std::string ServerProcess::log() const {
    std::ifstream file(log_path_);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// The log's last line that says something went wrong, else its last.
std::string ServerProcess::last_words() const {
    std::istringstream lines(log());
    std::string last = "its log is empty";
    bool found = false;
    for (std::string line; std::getline(lines, line);) {
        const bool error = line.find("rror") != std::string::npos || line.rfind("tq: ", 0) == 0;
        if (!line.empty() && (error || !found)) {
            last = line;
            found = found || error;
        }
    }
    return last.substr(0, 400);
}

int64_t ServerProcess::kv_bytes() const {
    if (const nlohmann::json props = get_json(endpoint_, "/props"); props.is_object()) {
        if (const auto kv = props.find("kv"); kv != props.end() && kv->is_object() && kv->contains("bytes")) {
            return kv->at("bytes").get<int64_t>();
        }
    }
    std::vector<llm::LogLine> lines;
    std::istringstream text(log());
    for (std::string line; std::getline(text, line);) {
        lines.push_back({llm::LogLevel::info, line});
    }
    return std::llround(llm::read_memory_log(lines).kv_buffer_mib * 1024 * 1024);
}

} // namespace turboquant::app
