// How much of waiting prompts one step reads, so that running streams do not stall: learned from the steps so far.
#pragma once

#include <cstdint>

namespace turboquant::serve {

class StepBudget {
public:
    // target: seconds that a step may take while answers are being written. most: tokens a step can take at all.
    StepBudget(double target, int64_t most) : target_(target), most_(most) {}

    // Prompt tokens for the next step, in which `decoding` answers go on: at least kLeast, at most `most`; `most` where
    // nobody waits for a token.
    int64_t prompt_tokens(int decoding) const;

    // A step is over: it read `prompt` tokens and wrote `decoded` (one each for so many answers) in `seconds`.
    void record(int64_t prompt, int64_t decoded, double seconds);

    static constexpr int64_t kLeast = 8; // so that a prompt gets somewhere however slow the model is

private:
    double target_;
    int64_t most_;
    double token_seconds_ = 0;  // of a prompt token; 0: nothing known yet
    double decode_seconds_ = 0; // of a step that only decodes
};

} // namespace turboquant::serve
