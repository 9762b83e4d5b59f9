#include "llm/evaluation.h"

#include "llm/error.h"
#include "llm/session.h"
#include "llm/sysinfo.h"

#include <turboquant/codec.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <thread>

#include <fmt/format.h>
#include <ggml.h>

namespace turboquant::llm {
namespace {

constexpr int64_t kLeastContext = 16;

std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    for (;;) {
        const size_t end = text.find(separator);
        parts.push_back(text.substr(0, end));
        if (end == std::string_view::npos) {
            return parts;
        }
        text.remove_prefix(end + 1);
    }
}

// Every fp16 number as a log-probability and as a probability.
struct HalfTable {
    std::vector<double> value = std::vector<double>(1 << 16);
    std::vector<double> exp = std::vector<double>(1 << 16);
    HalfTable() {
        for (uint32_t i = 0; i < value.size(); ++i) {
            value[i] = static_cast<double>(ggml_fp16_to_fp32(static_cast<ggml_fp16_t>(i)));
            exp[i] = std::exp(value[i]);
        }
    }
};

const HalfTable& half_table() {
    static const HalfTable table;
    return table;
}

double checked_log_sum_exp(const float* logits, int64_t n) {
    const double result = log_sum_exp(logits, n);
    if (!std::isfinite(result)) {
        throw Error("the model's scores are not finite numbers; the model file may be damaged (run tq info on it), or "
                    "its values do not fit this cache");
    }
    return result;
}

double mean(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// body(i) for 0 <= i < n on several threads; the first exception comes back.
void for_each(size_t n, int threads, const std::function<void(size_t)>& body) {
    std::atomic<size_t> next{0};
    std::exception_ptr failure;
    std::mutex mutex;
    const auto work = [&] {
        try {
            for (size_t i = next++; i < n; i = next++) {
                body(i);
            }
        } catch (...) {
            const std::lock_guard lock(mutex);
            failure = failure ? failure : std::current_exception();
        }
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < std::min(n, static_cast<size_t>(threads)); ++i) {
        others.emplace_back(work);
    }
    work();
    for (std::thread& thread : others) {
        thread.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

// Bits of a value, scales of 16 bits for each rotation block included.
double coded_bits(int bits, int head_size) {
    if (bits > 8) {
        return bits;
    }
    Rotation rotation;
    if (const Status status = Rotation::create(head_size, rotation); !status.ok()) {
        throw Error(status.message());
    }
    return bits + 16.0 * static_cast<double>(rotation.blocks().size()) / head_size;
}

} // namespace

std::vector<Setting> parse_settings(std::string_view list, std::optional<int> window, std::optional<int> sinks) {
    std::vector<Setting> settings;
    for (const std::string_view text : split(list, ',')) {
        const std::vector<std::string_view> parts = split(text, ':');
        KvFlags flags;
        flags.kv = std::string(parts[0]);
        std::optional<bool> calibrate;
        for (size_t i = 1; i < parts.size(); ++i) {
            if (parts[i] == "self" || parts[i] == "off") {
                calibrate = parts[i] == "self";
                continue;
            }
            std::optional<int>* rows = parts[i].substr(0, 1) == "w"   ? &flags.window
                                       : parts[i].substr(0, 1) == "s" ? &flags.sinks
                                                                      : nullptr;
            int value = 0;
            const char* end = parts[i].data() + parts[i].size();
            if (rows == nullptr || *rows || parts[i].size() < 2 ||
                std::from_chars(parts[i].data() + 1, end, value).ptr != end) {
                throw UsageError(fmt::format("--kv {}: '{}' is not understood; after a cache come :wN (window), :sN "
                                             "(sinks) and :self or :off (no profile: calibrated from its first "
                                             "rows, or not conditioned), as in tq4:w0:s4",
                                             text, parts[i]));
            }
            *rows = value;
        }
        if (parse_kv(*flags.kv).turboquant()) {
            flags.window = flags.window ? flags.window : window;
            flags.sinks = flags.sinks ? flags.sinks : sinks;
        }
        KvChoice kv = resolve_kv(flags);
        kv.calibrate = kv.turboquant() ? calibrate : std::nullopt;
        settings.push_back({std::string(text), kv});
    }
    return settings;
}

CachePlan full_cache_plan(CachePlan plan) {
    for (CacheLayer& layer : plan.layers) {
        layer.cells = plan.context;
    }
    return plan;
}

Footprint footprint(const CachePlan& plan, const KvChoice& kv) {
    KvChoice coded = kv;
    coded.window = 0;
    coded.sinks = 0;
    const int64_t bytes = kv_bytes(plan, coded);
    Footprint result;
    double values = 0;
    double bits = 0;
    for (const CacheLayer& layer : plan.layers) {
        const double rows = static_cast<double>(layer.cells) * layer.kv_heads;
        values += rows * (layer.key_size + layer.value_size);
        if (kv.turboquant() && !kv.emulate_q4_0) {
            const LayerBits width = kv.bits_of(layer.index);
            bits += rows * layer.key_size * coded_bits(width.key, layer.key_size);
            bits += layer.value_size == 0 ? 0 : rows * layer.value_size * coded_bits(width.value, layer.value_size);
        }
    }
    if (!kv.turboquant() || kv.emulate_q4_0) {
        bits = 8.0 * static_cast<double>(bytes) / plan.f16_scale;
    }
    result.bits_per_value = values > 0 ? bits / values : 0;
    result.bytes_per_token = static_cast<double>(bytes) / static_cast<double>(plan.context);
    result.exact_bytes = kv.turboquant() ? kv_bytes(plan, kv) - bytes : 0;
    return result;
}

std::vector<int64_t> chunk_starts(int64_t tokens, int64_t context, int64_t chunks) {
    if (tokens / context < chunks) {
        throw UsageError(fmt::format("the text has {} tokens, {} chunks of {} need {}; give a longer one (--file), or "
                                     "use fewer --chunks or a smaller --ctx",
                                     format_count(tokens), chunks, context, format_count(chunks * context)));
    }
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < chunks; ++i) {
        const int64_t begin = tokens * i / chunks;
        const int64_t end = tokens * (i + 1) / chunks;
        starts.push_back(begin + (end - begin - context) / 2);
    }
    return starts;
}

std::vector<int64_t> scored_positions(int64_t context, int64_t stride) {
    std::vector<int64_t> positions;
    for (int64_t position = context / 2; position + 1 < context; position += stride) {
        positions.push_back(position);
    }
    return positions;
}

Chunks make_chunks(const Model& model, std::string_view text, int64_t context, int64_t chunks, int64_t stride) {
    if (context < kLeastContext) {
        throw UsageError(
            fmt::format("--ctx {}: chunks have at least {} tokens; use 2048, for example", context, kLeastContext));
    }
    const std::vector<Token> tokens = model.tokenize(text, false, false);
    Chunks result;
    result.context = context;
    result.stride = stride;
    result.positions = scored_positions(context, stride);
    for (const int64_t start : chunk_starts(static_cast<int64_t>(tokens.size()), context, chunks)) {
        result.tokens.emplace_back(tokens.begin() + start, tokens.begin() + start + context);
        if (llama_vocab_get_add_bos(model.vocab())) {
            result.tokens.back().front() = llama_vocab_bos(model.vocab());
        }
    }
    return result;
}

double log_sum_exp(const float* logits, int64_t n) {
    const auto max = static_cast<double>(logits[argmax(logits, n)]);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        sum += std::exp(static_cast<double>(logits[i]) - max);
    }
    return max + std::log(sum);
}

int64_t argmax(const float* logits, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

double negative_log_likelihood(const float* logits, int64_t n, Token next) {
    return checked_log_sum_exp(logits, n) - static_cast<double>(logits[next]);
}

BaseRow make_base_row(const float* logits, int64_t n, Token next, uint16_t* out) {
    const double total = checked_log_sum_exp(logits, n);
    for (int64_t i = 0; i < n; ++i) {
        out[i] = ggml_fp32_to_fp16(static_cast<float>(static_cast<double>(logits[i]) - total));
    }
    return {out, static_cast<Token>(argmax(logits, n)), total - static_cast<double>(logits[next])};
}

Score compare(const BaseRow& base, const float* logits, int64_t n, Token next) {
    const HalfTable& half = half_table();
    const double total = checked_log_sum_exp(logits, n);
    // sum of q is 1: only p and p (log p - log q) are left to add.
    double mass = 0;
    double cross = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double p = half.exp[base.log_probs[i]];
        if (p > 0) {
            mass += p;
            cross += p * (half.value[base.log_probs[i]] - (static_cast<double>(logits[i]) - total));
        }
    }
    Score score;
    score.kld = 1 - mass + cross;
    score.nll = total - static_cast<double>(logits[next]);
    score.nll_base = base.nll;
    score.top1 = argmax(logits, n) == base.top;
    return score;
}

double quantile(std::vector<double> values, double q) {
    std::sort(values.begin(), values.end());
    const double at = q * static_cast<double>(values.size() - 1);
    const auto below = static_cast<size_t>(at);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}

double standard_error(const std::vector<double>& values) {
    if (values.size() < 2) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const double centre = mean(values);
    double squares = 0;
    for (const double value : values) {
        squares += (value - centre) * (value - centre);
    }
    const auto n = static_cast<double>(values.size());
    return std::sqrt(squares / (n - 1) / n);
}

Figures summarise(const std::vector<std::vector<Score>>& chunks) {
    std::vector<double> klds;
    std::vector<double> chunk_nll;
    Figures figures;
    double nll = 0;
    double nll_base = 0;
    double same = 0;
    for (const std::vector<Score>& scores : chunks) {
        double kld_sum = 0;
        double nll_sum = 0;
        for (const Score& score : scores) {
            klds.push_back(score.kld);
            kld_sum += score.kld;
            nll_sum += score.nll;
            nll_base += score.nll_base;
            same += score.top1 ? 1 : 0;
        }
        nll += nll_sum;
        figures.kld_chunks.push_back(kld_sum / static_cast<double>(scores.size()));
        chunk_nll.push_back(nll_sum / static_cast<double>(scores.size()));
    }
    const auto n = static_cast<double>(klds.size());
    figures.positions = static_cast<int64_t>(klds.size());
    figures.kld_mean = mean(klds);
    figures.kld_se = standard_error(figures.kld_chunks);
    figures.kld_median = quantile(klds, 0.5);
    figures.kld_p99 = quantile(klds, 0.99);
    figures.kld_max = *std::max_element(klds.begin(), klds.end());
    figures.top1 = same / n;
    figures.ppl = std::exp(nll / n);
    figures.ppl_se = figures.ppl * standard_error(chunk_nll);
    figures.ppl_base = std::exp(nll_base / n);
    return figures;
}

void read_chunks(const Model& model, const Chunks& chunks, const ReadOptions& options, const OnRow& row,
                 const AfterRows& after) {
    const auto vocabulary = static_cast<size_t>(llama_vocab_n_tokens(model.vocab()));
    SessionOptions session_options;
    session_options.kv = options.kv;
    session_options.plan = options.plan;
    session_options.threads = options.threads;
    session_options.full_cache = true;
    session_options.interrupt = options.interrupt;
    const int threads = options.threads > 0 ? options.threads : default_threads();
    for (size_t chunk = 0; chunk < chunks.tokens.size(); ++chunk) {
        // A context of its own: nothing that a cache learned from one chunk counts in another.
        Session session(model, session_options);
        const std::vector<Token>& tokens = chunks.tokens[chunk];
        const auto on_scores = [&](size_t first, size_t n, const float* logits) {
            for_each(n, threads, [&](size_t i) {
                row(chunk, first + i, tokens[static_cast<size_t>(chunks.positions[first + i]) + 1],
                    logits + i * vocabulary);
            });
            if (after) {
                after(chunk, first, n);
            }
        };
        const Progress progress = [&](double fraction) {
            if (options.progress) {
                options.progress((static_cast<double>(chunk) + fraction) / static_cast<double>(chunks.tokens.size()));
            }
        };
        if (!session.score(tokens, chunks.positions, on_scores, progress)) {
            throw Error("stopped by Ctrl-C");
        }
    }
}

} // namespace turboquant::llm
