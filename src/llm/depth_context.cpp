#include "llm/depth_context.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/plan.h"
#include "llm/plugin.h"
#include "llm/session.h"
#include "llm/sysinfo.h"

#include <algorithm>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

// Copies pass through this one on their way to sequence 0.
constexpr llama_seq_id kCopy = 1;

ggml_type cache_type(const KvChoice& kv) {
    if (kv.turboquant()) {
        return GGML_TYPE_F16; // what the plug-in shows to the host
    }
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char* name = ggml_type_name(static_cast<ggml_type>(i));
        if (name != nullptr && kv.host_type == name) {
            return static_cast<ggml_type>(i);
        }
    }
    throw Error(fmt::format("this libllama has no cache type {}; use --kv f16", kv.host_type));
}

double seconds_since(int64_t start_us) {
    return static_cast<double>(llama_time_us() - start_us) * 1e-6;
}

} // namespace

bool DepthContext::can_tile(const Model& model) {
    return llama_model_n_swa(model.get()) == 0 && !llama_model_is_recurrent(model.get()) &&
           !llama_model_is_hybrid(model.get());
}

DepthContext::DepthContext(const Model& model, const DepthOptions& options)
    : model_(model), options_(options), threads_(options.threads > 0 ? options.threads : default_threads()) {
    const KvChoice& kv = options_.kv;
    if (kv.turboquant()) {
        configure_plugin(kv, options_.head_size);
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(options_.capacity);
    params.n_batch = kBatch;
    params.n_ubatch = kBatch;
    params.n_seq_max = 2;
    params.kv_unified = true; // sequences share the cells, so that a copy costs nothing and one may own all
    params.n_threads = threads_;
    params.n_threads_batch = threads_;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = cache_type(kv);
    params.type_v = params.type_k;
    params.offload_kqv = true;
    params.swa_full = false;
    params.no_perf = true;
    params.abort_callback = [](void* interrupt) {
        return interrupt != nullptr && static_cast<const std::atomic<bool>*>(interrupt)->load();
    };
    params.abort_callback_data = const_cast<std::atomic<bool>*>(options_.interrupt);
    const LogCapture log;
    ctx_ = new_context(model.get(), params);
    if (!ctx_ || llama_get_memory(ctx_.get()) == nullptr) {
        throw Error(fmt::format("{}: no context of {} tokens with the {} cache: {}", model.path(),
                                format_count(options_.capacity), kv.name, log.reason("libllama gave no reason")));
    }
}

DepthContext::~DepthContext() = default;

std::vector<Token> DepthContext::random_tokens(int64_t n) {
    const auto vocabulary = static_cast<uint32_t>(llama_vocab_n_tokens(model_.vocab()));
    std::vector<Token> tokens(static_cast<size_t>(n));
    for (Token& token : tokens) {
        token = static_cast<Token>(random_() % vocabulary);
    }
    return tokens;
}

int DepthContext::decode_tokens(std::vector<Token>& tokens) {
    return llama_decode(ctx_.get(), llama_batch_get_one(tokens.data(), static_cast<int32_t>(tokens.size())));
}

// n random tokens to the end of sequence 0, `batch` at a time. Does not count them as part of the depth.
void DepthContext::append(int64_t n, int64_t batch, const Progress& progress) {
    const LogCapture log;
    for (int64_t done = 0; done < n; done += batch) {
        std::vector<Token> tokens = random_tokens(std::min(batch, n - done));
        const bool stopped = options_.interrupt != nullptr && options_.interrupt->load();
        const int result = stopped ? 2 : decode_tokens(tokens);
        if (result == 2) {
            throw Error("stopped by Ctrl-C");
        }
        if (result != 0) {
            throw Error(fmt::format("{}: decoding failed at a depth of {} with the {} cache: {}", model_.path(),
                                    format_count(depth_ + done), options_.kv.name,
                                    log.reason("libllama gave no reason")));
        }
        if (progress) {
            progress(static_cast<double>(done + static_cast<int64_t>(tokens.size())) / static_cast<double>(n));
        }
    }
    llama_synchronize(ctx_.get());
}

// Removes what was decoded behind the depth. A sliding layer has forgotten older rows for it, and a recurrent one has no
// rows, so there the state is put back.
void DepthContext::take_back() {
    llama_memory_t memory = llama_get_memory(ctx_.get());
    if (can_tile(model_)) {
        llama_memory_seq_rm(memory, 0, end_, -1);
        return;
    }
    llama_memory_clear(memory, true);
    if (!saved_.empty() && llama_state_seq_set_data(ctx_.get(), saved_.data(), saved_.size(), 0) != saved_.size()) {
        throw Error(fmt::format("{}: the state of {} tokens cannot be restored into the {} cache", model_.path(),
                                format_count(depth_), options_.kv.name));
    }
}

void DepthContext::save() {
    saved_.clear();
    if (!can_tile(model_) && depth_ > 0) {
        saved_.resize(llama_state_seq_get_size(ctx_.get(), 0));
        saved_.resize(llama_state_seq_get_data(ctx_.get(), saved_.data(), saved_.size(), 0));
    }
}

void DepthContext::restore_tile() {
    llama_memory_t memory = llama_get_memory(ctx_.get());
    const size_t before = llama_state_seq_get_size(ctx_.get(), 0);
    const LogCapture log;
    if (llama_state_seq_set_data(ctx_.get(), tile_.data(), tile_.size(), kCopy) != tile_.size()) {
        throw Error(fmt::format(
            "{}: the state of {} tokens cannot be restored into the {} cache: {}; use --prefill real", model_.path(),
            format_count(options_.tile), options_.kv.name, log.reason("libllama gave no reason")));
    }
    llama_memory_seq_cp(memory, kCopy, 0, 0, -1);
    llama_memory_seq_rm(memory, kCopy, -1, -1);
    // A copy that is not sequence 0's is not attended to, and the figures would be those of a shorter context. A sequence's
    // state has all its cells, so it must have grown by a tile (less what is not of cells).
    if (2 * (llama_state_seq_get_size(ctx_.get(), 0) - before) < tile_.size()) {
        throw Error(
            fmt::format("{}: a copy of {} tokens was restored, but sequence 0 does not hold it; use --prefill real",
                        model_.path(), format_count(options_.tile)));
    }
    ++copies_;
}

void DepthContext::fill(int64_t depth, const Progress& progress) {
    llama_memory_t memory = llama_get_memory(ctx_.get());
    const int64_t tile = options_.tile;
    if (depth > options_.capacity) {
        throw Error(fmt::format("a depth of {} in a cache of {} cells", depth, options_.capacity));
    }
    if (depth < depth_) {
        llama_memory_clear(memory, true);
        depth_ = copies_ = 0;
        end_ = 0;
    }
    const bool tiled = tile > 0 && depth > tile && can_tile(model_);
    const int64_t first = tiled ? tile : depth; // read in any case
    if (depth_ < first) {
        append(first - depth_, kBatch, progress);
        depth_ = first;
        end_ = static_cast<llama_pos>(depth_);
        copies_ = 1;
    }
    if (!tiled) {
        save();
        return;
    }
    if (tile_.empty()) {
        tile_.resize(llama_state_seq_get_size(ctx_.get(), 0));
        tile_.resize(llama_state_seq_get_data(ctx_.get(), tile_.data(), tile_.size(), 0));
    }
    end_ = static_cast<llama_pos>(tile); // a rest that a smaller depth had goes
    take_back();
    while ((copies_ + 1) * tile <= depth) {
        restore_tile();
    }
    depth_ = copies_ * tile;
    append(depth - depth_, kBatch, {});
    end_ += static_cast<llama_pos>(depth - depth_);
    depth_ = depth;
}

double DepthContext::decode(int64_t n) {
    append(1, 1, {}); // what ran before may have left other data in the caches
    const int64_t start = llama_time_us();
    append(n, 1, {});
    const double seconds = seconds_since(start);
    take_back();
    return seconds;
}

double DepthContext::read(int64_t n) {
    const int64_t start = llama_time_us();
    append(n, kBatch, {});
    const double seconds = seconds_since(start);
    take_back();
    return seconds;
}

const float* DepthContext::scores(Token token) {
    std::vector<Token> tokens = {token};
    if (decode_tokens(tokens) != 0) {
        throw Error(fmt::format("{}: decoding failed at a depth of {}", model_.path(), depth_));
    }
    llama_synchronize(ctx_.get());
    take_back();
    return llama_get_logits_ith(ctx_.get(), -1);
}

} // namespace turboquant::llm
