// From tokens to the text of an answer: whole characters only, nothing of a stop string, each token's scores with the
// text that it is part of.
#pragma once

#include "llm/model.h"
#include "llm/utf8.h"
#include "serve/engine/stop_matcher.h"

#include <deque>
#include <optional>
#include <string>
#include <vector>

namespace turboquant::serve {

// A token and its natural logarithm of probability, by the model's own scores (no temperature, no penalties).
struct Candidate {
    llm::Token token = 0;
    std::string bytes; // not necessarily whole characters; control tokens by name
    double logprob = 0;
};

struct TokenScore {
    Candidate chosen;
    std::vector<Candidate> top; // likeliest first
};

class AnswerText {
public:
    struct Piece {
        std::string text;
        std::vector<TokenScore> scores; // of the tokens that begin in what has come so far
        bool empty() const { return text.empty() && scores.empty(); }
    };

    explicit AnswerText(std::vector<std::string> stops) : matcher_(std::move(stops)) {}

    // One token's bytes. What can go out now; nothing more once stopped() is true.
    Piece push(std::string_view bytes, std::optional<TokenScore> score);
    // The rest, where the answer ended without a stop string. An incomplete character becomes U+FFFD.
    Piece finish();

    bool stopped() const { return matcher_.stopped(); }

private:
    struct Waiting {
        TokenScore score;
        size_t begin = 0; // of its text
        size_t end = 0;
    };

    llm::Utf8Stream characters_;
    StopMatcher matcher_;
    std::deque<Waiting> waiting_;
    size_t length_ = 0;   // bytes of all whole characters so far
    size_t released_ = 0; // of them, gone out
};

} // namespace turboquant::serve
