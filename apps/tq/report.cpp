#include "report.h"

#include <fmt/format.h>

namespace turboquant::app {

std::string kv_words(int64_t kv_bytes, int64_t f16_bytes) {
    const std::string kv = llm::format_bytes(kv_bytes);
    if (kv_bytes <= 0 || f16_bytes <= 0) {
        return fmt::format("KV {}", kv);
    }
    const double ratio = static_cast<double>(f16_bytes) / static_cast<double>(kv_bytes);
    if (ratio > 0.995 && ratio < 1.005) {
        return fmt::format("KV {}", kv); // it is f16; the log rounds
    }
    return ratio >= 1 ? fmt::format("KV {}, {:.2f}x below f16 ({})", kv, ratio, llm::format_bytes(f16_bytes))
                      : fmt::format("KV {}, {:.2f}x of f16 ({})", kv, 1 / ratio, llm::format_bytes(f16_bytes));
}

std::string stats_line(const llm::Answer& answer, int64_t limit) {
    const llm::Stats& stats = answer.stats;
    std::string line;
    if (answer.stop == llm::Stop::limit) {
        line = fmt::format("stopped after {} tokens (-n {}) | ", stats.answer_tokens, limit);
    } else if (answer.stop == llm::Stop::context) {
        line = fmt::format("stopped: the context of {} is full, use a larger --ctx | ",
                           llm::format_count(stats.context_size));
    } else if (answer.stop == llm::Stop::interrupted) {
        line = "stopped by Ctrl-C | ";
    }
    if (stats.prompt_tokens > 0) {
        const std::string cached = stats.read_tokens < stats.prompt_tokens
                                       ? fmt::format(" ({} cached)", stats.prompt_tokens - stats.read_tokens)
                                       : "";
        line += fmt::format("prompt {} tokens{}, {:.1f} tok/s | answer {} tokens", stats.prompt_tokens, cached,
                            stats.read_speed(), stats.answer_tokens);
        line += stats.answer_tokens > 1 ? fmt::format(", {:.1f} tok/s | ", stats.answer_speed()) : " | ";
        line += fmt::format("first token {:.2f} s | ", stats.first_token_seconds);
    }
    return line + fmt::format("context {}/{} | {}", stats.context_used, stats.context_size,
                              kv_words(stats.kv_bytes, stats.kv_f16_bytes));
}

nlohmann::json stats_json(const llm::Stats& stats) {
    return {{"prompt_tokens", stats.prompt_tokens},
            {"prompt_tokens_read", stats.read_tokens},
            {"prompt_tokens_per_second", stats.read_speed()},
            {"answer_tokens", stats.answer_tokens},
            {"answer_tokens_per_second", stats.answer_speed()},
            {"first_token_seconds", stats.first_token_seconds},
            {"context_used", stats.context_used},
            {"context_size", stats.context_size},
            {"kv_bytes", stats.kv_bytes},
            {"kv_f16_bytes", stats.kv_f16_bytes}};
}

} // namespace turboquant::app
