// Choosing a token and telling how likely it was, from a row of scores (logits).
#pragma once

#include "serve/engine/answer_text.h"

#include <span>

namespace turboquant::serve {

// Index of the largest score, the first of equal ones.
llm::Token likeliest(std::span<const float> logits);

// The chosen token and the `top` likeliest ones with their log probabilities.
TokenScore score_token(const llm::Model& model, std::span<const float> logits, llm::Token chosen, int top);

} // namespace turboquant::serve
