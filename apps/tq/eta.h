// Progress of a long job in several steps, with the time that is left. On stderr.
#pragma once

#include "llm/model.h"

#include <chrono>
#include <string>

namespace turboquant::app {

// On a terminal one line that is redrawn ("2/5 tq4 43 %, 1 min 10 s left"); elsewhere only the lines of done().
class Eta {
public:
    explicit Eta(int steps);

    // Starts the next step, of `work` in any unit; `later`: what the steps after it will take together.
    void begin(const std::string& what, double work, double later);
    llm::Progress progress(); // of the step begun last
    // Ends it, with a line that says how it went.
    void done(const std::string& result);

private:
    double elapsed() const;
    void wipe();

    int steps_;
    int step_ = 0;
    std::string what_;
    double work_ = 0;
    double later_ = 0;
    double finished_ = 0;         // work of earlier steps
    double finished_seconds_ = 0; // and what it took
    double shown_ = -1;
    size_t width_ = 0;
    std::chrono::steady_clock::time_point start_;
};

// 95 -> "1 min 35 s".
std::string duration_words(double seconds);

} // namespace turboquant::app
