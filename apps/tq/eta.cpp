#include "eta.h"

#include "terminal.h"

#include <cmath>
#include <cstdio>

#include <unistd.h>

#include <fmt/format.h>

namespace turboquant::app {

std::string duration_words(double seconds) {
    const auto whole = static_cast<int64_t>(std::llround(seconds));
    return whole < 60     ? fmt::format("{} s", whole)
           : whole < 3600 ? fmt::format("{} min {:02} s", whole / 60, whole % 60)
                          : fmt::format("{} h {:02} min", whole / 3600, whole % 3600 / 60);
}

Eta::Eta(int steps) : steps_(steps) {}

double Eta::elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Eta::wipe() {
    if (width_ > 0) {
        fmt::print(stderr, "\r{:{}}\r", "", width_);
        std::fflush(stderr);
        width_ = 0;
    }
}

void Eta::begin(const std::string& what, double work, double later) {
    ++step_;
    what_ = what;
    work_ = work;
    later_ = later;
    shown_ = -1;
    start_ = std::chrono::steady_clock::now();
}

llm::Progress Eta::progress() {
    if (isatty(STDERR_FILENO) == 0) {
        return {};
    }
    return [this](double fraction) {
        if (elapsed() - shown_ < 0.2 && shown_ >= 0) {
            return;
        }
        shown_ = elapsed();
        const double done = finished_ + fraction * work_;
        std::string line = fmt::format("{}/{} {} {:.0f} %", step_, steps_, what_, 100 * fraction);
        if (done > 0) {
            const double left = (1 - fraction) * work_ + later_;
            line += fmt::format(", {} left", duration_words((finished_seconds_ + elapsed()) * left / done));
        }
        fmt::print(stderr, "\r{:<{}}", line, width_);
        std::fflush(stderr);
        width_ = line.size();
    };
}

void Eta::done(const std::string& result) {
    wipe();
    print_note(fmt::format("{}/{} {}: {} ({})", step_, steps_, what_, result, duration_words(elapsed())));
    finished_ += work_;
    finished_seconds_ += elapsed();
}

} // namespace turboquant::app
