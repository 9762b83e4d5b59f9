// Statistics in words and as JSON.
#pragma once

#include "llm/session.h"

#include <string>

#include <nlohmann/json.hpp>

namespace turboquant::app {

// One line: prompt and answer speed, time to the first token, context used, KV bytes against f16, why it stopped.
std::string stats_line(const llm::Answer& answer, int64_t limit);
// "KV 47.8 MiB, 3.8x below f16 (180 MiB)".
std::string kv_words(int64_t kv_bytes, int64_t f16_bytes);
nlohmann::json stats_json(const llm::Stats& stats);

} // namespace turboquant::app
