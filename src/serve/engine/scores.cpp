#include "serve/engine/scores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace turboquant::serve {

llm::Token likeliest(std::span<const float> logits) {
    return static_cast<llm::Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

TokenScore score_token(const llm::Model& model, std::span<const float> logits, llm::Token chosen, int top) {
    const float largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) {
        sum += std::exp(logit - largest);
    }
    const double log_sum = std::log(sum) + static_cast<double>(largest);
    const auto candidate = [&](llm::Token token) {
        return Candidate{token, model.piece(token, true),
                         static_cast<double>(logits[static_cast<size_t>(token)]) - log_sum};
    };
    TokenScore score{candidate(chosen), {}};
    if (top > 0) {
        std::vector<llm::Token> order(logits.size());
        std::iota(order.begin(), order.end(), 0);
        const auto n = static_cast<std::ptrdiff_t>(std::min(order.size(), static_cast<size_t>(top)));
        std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](llm::Token a, llm::Token b) {
            const float x = logits[static_cast<size_t>(a)];
            const float y = logits[static_cast<size_t>(b)];
            return x > y || (x == y && a < b);
        });
        for (std::ptrdiff_t i = 0; i < n; ++i) {
            score.top.push_back(candidate(order[static_cast<size_t>(i)]));
        }
    }
    return score;
}

} // namespace turboquant::serve
