// What a cache setting costs: the arithmetic of `tq eval`, and reading chunks of text through a setting.
//
// Every chunk is read by a context of its own, as one prompt, and scored in its second half: the scores after position p
// say how well the model, attending to the setting's cache of positions 0..p, predicts token p + 1.
#pragma once

#include "llm/kv_choice.h"
#include "llm/model.h"
#include "llm/plan.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant::llm {

// ---- settings --------------------------------------------------------------------------------------------------------

struct Setting {
    std::string label; // as the user wrote it: "tq4:w0"
    KvChoice kv;
};

// "tq4,5/4:w0:s4,q8_0": each as --kv takes it, with its own window (:w), sinks (:s) and source of the keys' conditioning
// (:self, :off; else a profile) after it. `window` and `sinks`
// count for all TurboQuant settings without their own. UsageError names the part that is wrong.
std::vector<Setting> parse_settings(std::string_view list, std::optional<int> window, std::optional<int> sinks);

// What a setting's rows take, all layers together.
struct Footprint {
    double bits_per_value = 0;  // codes and scales of a row that is not exact
    double bytes_per_token = 0; // as allocated, bookkeeping included, without the exact rows
    int64_t exact_bytes = 0;    // window and sinks, whatever the length
};
// plan: its layers hold plan.context rows each (full_cache_plan).
Footprint footprint(const CachePlan& plan, const KvChoice& kv);
// The plan of a context whose sliding layers keep all rows.
CachePlan full_cache_plan(CachePlan plan);

// ---- chunks ----------------------------------------------------------------------------------------------------------

// First tokens of `chunks` chunks of `context` tokens, each in the middle of its share of the text. UsageError when the
// text is shorter than all of them together.
std::vector<int64_t> chunk_starts(int64_t tokens, int64_t context, int64_t chunks);
// Every stride-th position of the second half that has a next token: context / 2 .. context - 2.
std::vector<int64_t> scored_positions(int64_t context, int64_t stride);

struct Chunks {
    std::vector<std::vector<Token>> tokens; // `context` each; the first one is BOS where the model wants that
    std::vector<int64_t> positions;         // scored, of every chunk
    int64_t context = 0;
    int64_t stride = 0;
};
// UsageError: the text is too short.
Chunks make_chunks(const Model& model, std::string_view text, int64_t context, int64_t chunks, int64_t stride);

// ---- scores ----------------------------------------------------------------------------------------------------------

// fp16 of log-probabilities, as they are kept of the base.
struct BaseRow {
    const uint16_t* log_probs = nullptr; // [vocabulary]
    Token top = 0;                       // likeliest token
    double nll = 0;                      // -log p(next token), before rounding
};

struct Score {
    double kld = 0; // KL(base || test) in nats
    double nll = 0; // -log p(next token)
    double nll_base = 0;
    bool top1 = false; // both find the same token the likeliest
};

// log(sum(exp(logits))), safe for any magnitude; not finite when a logit is NaN or +infinity.
double log_sum_exp(const float* logits, int64_t n);
int64_t argmax(const float* logits, int64_t n);
// -log p(next). Error when logits are not finite.
double negative_log_likelihood(const float* logits, int64_t n, Token next);

// Log-probabilities in fp16 to `out`; the likeliest token and the next one's nll. Error when logits are not finite.
BaseRow make_base_row(const float* logits, int64_t n, Token next, uint16_t* out);

// sum p (log p - log q) - p + q over the vocabulary, p the stored base: the terms are >= 0 and vanish in second order
// where q is near p, so that rounding p to fp16 does not show. Error when logits are not finite.
Score compare(const BaseRow& base, const float* logits, int64_t n, Token next);

struct Figures {
    int64_t positions = 0;
    double kld_mean = 0;
    double kld_se = 0; // standard error over the means of chunks; NaN for one chunk
    double kld_median = 0;
    double kld_p99 = 0;
    double kld_max = 0;
    double top1 = 0; // share, 0..1
    double ppl = 0;
    double ppl_se = 0; // by the delta method, from the chunks' mean nll; NaN for one chunk
    double ppl_base = 0;
    std::vector<double> kld_chunks; // means: for ratios of settings paired by chunk
};
// By chunk. At least one score in each.
Figures summarise(const std::vector<std::vector<Score>>& chunks);

// Linear between the neighbours, as NumPy's default. values: not empty, any order.
double quantile(std::vector<double> values, double q);
// Sample standard deviation / sqrt(n); NaN for fewer than two.
double standard_error(const std::vector<double>& values);

// ---- reading ---------------------------------------------------------------------------------------------------------

struct ReadOptions {
    KvChoice kv;
    CachePlan plan; // full_cache_plan of the chunks' context
    int threads = 0;
    const std::atomic<bool>* interrupt = nullptr;
    Progress progress; // over all chunks
};

// row(chunk, index into chunks.positions, next token, logits): called from several threads at once, each pair once.
// after(): when a batch's rows are done, in order; may be empty. Error "stopped by Ctrl-C" when interrupted.
using OnRow = std::function<void(size_t chunk, size_t index, Token next, const float* logits)>;
using AfterRows = std::function<void(size_t chunk, size_t first, size_t n)>;
void read_chunks(const Model& model, const Chunks& chunks, const ReadOptions& options, const OnRow& row,
                 const AfterRows& after);

} // namespace turboquant::llm
