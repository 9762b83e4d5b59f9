#include "serve/engine/step_budget.h"

#include <algorithm>

namespace turboquant::serve {
namespace {

constexpr int64_t kFirstGuess = 32; // tokens, before any prompt was measured
constexpr double kNewShare = 0.3;   // of a new measurement in the running mean

void mix(double& mean, double value) {
    mean = mean > 0 ? (1 - kNewShare) * mean + kNewShare * value : value;
}

} // namespace

int64_t StepBudget::prompt_tokens(int decoding) const {
    if (decoding == 0) {
        return most_;
    }
    if (token_seconds_ <= 0) {
        return std::min(kFirstGuess, most_);
    }
    const double left = std::max(0.0, target_ - decode_seconds_);
    return std::clamp(static_cast<int64_t>(left / token_seconds_), kLeast, most_);
}

void StepBudget::record(int64_t prompt, int64_t decoded, double seconds) {
    if (prompt == 0) {
        mix(decode_seconds_, seconds);
        return;
    }
    // A few tokens cost as much as one: nothing to learn about many.
    if (prompt >= kLeast) {
        const double rest = decoded > 0 ? std::max(seconds / 4, seconds - decode_seconds_) : seconds;
        mix(token_seconds_, rest / static_cast<double>(prompt));
    }
}

} // namespace turboquant::serve
