#include "serve/engine/answer_text.h"

namespace turboquant::serve {

AnswerText::Piece AnswerText::push(std::string_view bytes, std::optional<TokenScore> score) {
    Piece piece;
    if (stopped()) {
        return piece;
    }
    const size_t begin = length_;
    const std::string whole = characters_.push(bytes);
    length_ += whole.size();
    if (score) {
        waiting_.push_back({std::move(*score), begin, length_});
    }
    piece.text = matcher_.push(whole);
    released_ += piece.text.size();
    while (!waiting_.empty() && (stopped() ? waiting_.front().begin < released_ : waiting_.front().end <= released_)) {
        piece.scores.push_back(std::move(waiting_.front().score));
        waiting_.pop_front();
    }
    if (stopped()) {
        waiting_.clear();
    }
    return piece;
}

AnswerText::Piece AnswerText::finish() {
    Piece piece;
    if (stopped()) {
        return piece;
    }
    const std::string rest = characters_.finish();
    piece.text = matcher_.push(rest);
    if (!stopped()) {
        piece.text += matcher_.finish();
    }
    for (Waiting& waiting : waiting_) {
        piece.scores.push_back(std::move(waiting.score));
    }
    waiting_.clear();
    return piece;
}

} // namespace turboquant::serve
