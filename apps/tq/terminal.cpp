#include "terminal.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler writes it");

std::atomic<bool> terminated{false};

int wake_pipe[2] = {-1, -1};
int end_of_input = -1; // stands in for a pipe on stdin once the program is to end; -1: stdin is a terminal

void on_interrupt(int signal) {
    const int saved_errno = errno;
    if (interrupted.exchange(true)) {
        std::signal(signal, SIG_DFL);
        std::raise(signal);
    }
    const char byte = 0;
    [[maybe_unused]] const ssize_t written = write(wake_pipe[1], &byte, 1);
    errno = saved_errno;
}

void on_termination(int signal) {
    const int saved_errno = errno;
    if (terminated.exchange(true)) {
        std::signal(signal, SIG_DFL);
        std::raise(signal);
    }
    interrupted.store(true);
    if (end_of_input >= 0) {
        dup2(end_of_input, STDIN_FILENO); // or a read that begins right now would wait for ever
    }
    const char byte = 0;
    [[maybe_unused]] const ssize_t written = write(wake_pipe[1], &byte, 1);
    errno = saved_errno;
}

std::string styled(const char* code, const std::string& text) {
    return colours() ? fmt::format("\033[{}m{}\033[0m", code, text) : text;
}

} // namespace

bool colours() {
    static const bool yes = [] {
        const char* no_color = std::getenv("NO_COLOR");
        const char* term = std::getenv("TERM");
        return isatty(STDERR_FILENO) != 0 && (no_color == nullptr || *no_color == '\0') &&
               (term == nullptr || std::strcmp(term, "dumb") != 0);
    }();
    return yes;
}

std::string dim(const std::string& text) {
    return styled("2", text);
}

std::string bold(const std::string& text) {
    return styled("1", text);
}

std::string red(const std::string& text) {
    return styled("31", text);
}

void print_error(const std::string& message) {
    fmt::print(stderr, "{} {}\n", red("tq:"), message);
}

void print_note(const std::string& message) {
    fmt::print(stderr, "{}\n", dim(message));
}

llm::Progress progress(const std::string& what) {
    if (isatty(STDERR_FILENO) == 0) {
        return {};
    }
    const auto shown = std::make_shared<int>(-1);
    return [what, shown](double fraction) {
        const int percent = static_cast<int>(fraction * 100);
        if (fraction >= 1) {
            if (*shown >= 0) {
                fmt::print(stderr, "\r{:{}}\r", "", what.size() + 6);
                std::fflush(stderr);
            }
            *shown = -1;
        } else if (percent != *shown) {
            *shown = percent;
            fmt::print(stderr, "\r{} {:3}%", what, percent);
            std::fflush(stderr);
        }
    };
}

void catch_interrupts() {
    if (pipe2(wake_pipe, O_NONBLOCK | O_CLOEXEC) != 0) {
        wake_pipe[0] = wake_pipe[1] = -1;
    }
    struct sigaction action = {};
    action.sa_handler = on_interrupt;
    sigemptyset(&action.sa_mask);
    action.sa_flags = 0; // reading a line must come back at once
    sigaction(SIGINT, &action, nullptr);
}

const std::atomic<bool>& interrupt_flag() {
    return interrupted;
}

int interrupt_fd() {
    return wake_pipe[0];
}

bool take_interrupt() {
    char bytes[16];
    while (wake_pipe[0] >= 0 && read(wake_pipe[0], bytes, sizeof bytes) > 0) {}
    const bool was = interrupted.exchange(false);
    if (terminated) {
        interrupted = true;
    }
    return was;
}

void catch_termination() {
    if (isatty(STDIN_FILENO) == 0) {
        end_of_input = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
    struct sigaction action = {};
    action.sa_handler = on_termination;
    sigemptyset(&action.sa_mask);
    action.sa_flags = 0;
    sigaction(SIGTERM, &action, nullptr);
    sigaction(SIGHUP, &action, nullptr);
}

bool termination_requested() {
    return terminated;
}

} // namespace turboquant::app
