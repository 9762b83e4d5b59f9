#include "llm/helper_script.h"

#include "llm/error.h"
#include "llm/user_cache.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

extern char** environ; // POSIX

namespace turboquant::llm {
namespace {

namespace fs = std::filesystem;

std::string find_python() {
    if (const char* given = std::getenv("TQ_PYTHON"); given != nullptr && *given != '\0') {
        return given;
    }
#ifdef TURBOQUANT_PYTHON
    std::error_code ignored;
    if (fs::exists(TURBOQUANT_PYTHON, ignored)) {
        return TURBOQUANT_PYTHON;
    }
#endif
    return "python3";
}

std::string find_script(const std::string& name) {
    std::error_code ignored;
    const fs::path share = fs::read_symlink("/proc/self/exe", ignored).parent_path().parent_path() / "share/turboquant";
    if (!fs::is_regular_file(share / name, ignored)) {
        throw Error(fmt::format("{}: not found; it comes with tq, so install it again (or configure the build again)",
                                (share / name).string()));
    }
    return (share / name).string();
}

// The end of a pipe; closed with it.
struct PipeEnd {
    int fd = -1;
    ~PipeEnd() { close(); }
    void close() {
        if (fd >= 0) {
            ::close(fd);
            fd = -1;
        }
    }
};

} // namespace

std::string run_script(const std::string& name, const std::vector<std::string>& arguments, const Progress& progress) {
    std::vector<std::string> words = {find_python(), find_script(name)};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    argv.reserve(words.size() + 1);
    for (std::string& word : words) {
        argv.push_back(word.data());
    }
    argv.push_back(nullptr);

    int ends[2] = {-1, -1};
    if (pipe2(ends, O_CLOEXEC) != 0) {
        throw Error(fmt::format("{}: cannot be started: {}", words[1], std::strerror(errno)));
    }
    PipeEnd out{ends[0]};
    PipeEnd in{ends[1]};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, in.fd, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, in.fd, STDERR_FILENO);
    pid_t child = 0;
    const int failed = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    in.close();
    if (failed != 0) {
        throw Error(fmt::format("{}: cannot be started: {}; name a Python 3 with the gguf package in TQ_PYTHON",
                                words[0], std::strerror(failed)));
    }
    std::string pending;
    std::string result;
    std::string last;
    const auto take_lines = [&] {
        for (size_t end = pending.find('\n'); end != std::string::npos; end = pending.find('\n')) {
            const std::string line = pending.substr(0, end);
            pending.erase(0, end + 1);
            if (line.rfind("progress ", 0) == 0) {
                if (progress) {
                    progress(std::strtod(line.c_str() + 9, nullptr));
                }
            } else if (line.rfind("result ", 0) == 0) {
                result = line.substr(7);
            } else if (!line.empty()) {
                last = line;
            }
        }
    };
    char block[4096];
    for (;;) {
        const ssize_t n = ::read(out.fd, block, sizeof block);
        if (n < 0 && errno == EINTR) { // Ctrl-C reaches the script as well, which ends then
            continue;
        }
        if (n <= 0) {
            break;
        }
        pending.append(block, static_cast<size_t>(n));
        take_lines();
    }
    pending += '\n';
    take_lines();
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        throw Error(last.empty() ? fmt::format("{} failed without a reason; run it by hand", words[1]) : last);
    }
    return result;
}

std::string f32_copy(const std::string& model, const Progress& progress) {
    check_model_file(model);
    const fs::path path = user_cache_folder("eval") / fmt::format("f32-{}.gguf", file_identity(model));
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored)) {
        run_script("dequantise.py", {model, path.string()}, progress);
    }
    return path.string();
}

std::string sample_text(const std::string& kind) {
    return run_script("sample_text.py", {kind, user_cache_folder("eval").string()}, {});
}

} // namespace turboquant::llm
