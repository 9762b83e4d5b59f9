#include "llm/plan.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/sysinfo.h"

#include <turboquant/store.h>

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <gguf.h>

namespace turboquant::llm {
namespace {

constexpr int64_t kGranularity = 256;
// Dry runs cost memory per cell, so longer contexts are extended from two of them.
constexpr int64_t kLongestDryRun = 65536;
constexpr int64_t kLongestContext = int64_t{1} << 31;
constexpr int64_t kDefaultContext = 8192;

int64_t pad(int64_t cells) {
    return (cells + kGranularity - 1) / kGranularity * kGranularity;
}

double row_bytes(const std::string& type, int elements) {
    // Block of 32 elements: fp16 scale (and for *_1 a minimum) and the codes.
    const double per_element = type == "q8_0"   ? 34.0 / 32
                               : type == "q5_1" ? 24.0 / 32
                               : type == "q5_0" ? 22.0 / 32
                               : type == "q4_0" ? 18.0 / 32
                                                : 2.0;
    return per_element * elements;
}

struct GgufDeleter {
    void operator()(gguf_context* gguf) const { gguf_free(gguf); }
};

// The value(s) of an integer key or of an array of integers; nothing for other types.
std::vector<int64_t> integers(const gguf_context* gguf, int64_t key) {
    const auto one = [](gguf_type type, const void* data, size_t i, int64_t& value) {
        switch (type) {
        case GGUF_TYPE_UINT8: value = static_cast<const uint8_t*>(data)[i]; return true;
        case GGUF_TYPE_INT8: value = static_cast<const int8_t*>(data)[i]; return true;
        case GGUF_TYPE_UINT16: value = static_cast<const uint16_t*>(data)[i]; return true;
        case GGUF_TYPE_INT16: value = static_cast<const int16_t*>(data)[i]; return true;
        case GGUF_TYPE_UINT32: value = static_cast<const uint32_t*>(data)[i]; return true;
        case GGUF_TYPE_INT32: value = static_cast<const int32_t*>(data)[i]; return true;
        case GGUF_TYPE_UINT64: value = static_cast<int64_t>(static_cast<const uint64_t*>(data)[i]); return true;
        case GGUF_TYPE_INT64: value = static_cast<const int64_t*>(data)[i]; return true;
        default: return false;
        }
    };
    gguf_type type = gguf_get_kv_type(gguf, key);
    const bool array = type == GGUF_TYPE_ARRAY;
    if (type == GGUF_TYPE_STRING) {
        return {};
    }
    size_t n = 1;
    const void* data = nullptr;
    if (array) {
        type = gguf_get_arr_type(gguf, key);
        if (type == GGUF_TYPE_STRING) {
            return {};
        }
        n = gguf_get_arr_n(gguf, key);
        data = gguf_get_arr_data(gguf, key);
    } else {
        data = gguf_get_val_data(gguf, key);
    }
    std::vector<int64_t> values;
    int64_t value = 0;
    // Token tables have as many entries as the vocabulary and are of no interest here.
    for (size_t i = 0; i < n && n <= 4096 && one(type, data, i, value); ++i) {
        values.push_back(value);
    }
    return values;
}

} // namespace

int64_t kv_bytes(const CachePlan& plan, const KvChoice& choice) {
    double total = 0;
    for (const CacheLayer& layer : plan.layers) {
        for (const Side side : {Side::key, Side::value}) {
            const int size = side == Side::key ? layer.key_size : layer.value_size;
            if (size == 0) {
                continue;
            }
            if (!choice.turboquant()) {
                total += row_bytes(choice.host_type, size * layer.kv_heads) * static_cast<double>(layer.cells);
                continue;
            }
            const StoreShape shape = {side, size, layer.kv_heads, layer.cells};
            if (choice.emulate_q4_0) { // what the format would take
                total += row_bytes("q4_0", size * layer.kv_heads) * static_cast<double>(layer.cells) +
                         2.0 * (choice.window + choice.sinks) * shape.row_elements();
                continue;
            }
            const LayerBits bits = choice.bits_of(layer.index);
            size_t bytes = 0;
            const Status status =
                Store::bytes(shape, {side == Side::key ? bits.key : bits.value, choice.window, choice.sinks}, bytes);
            if (!status.ok()) {
                throw Error(fmt::format("{}: {}", choice.name, status.message()));
            }
            total += static_cast<double>(bytes);
        }
    }
    return std::llround(total * plan.f16_scale);
}

std::string shared_head_size(const CachePlan& plan) {
    if (plan.layers.empty() || plan.f16_scale != 1) {
        return {};
    }
    const CacheLayer& first = plan.layers.front();
    for (const CacheLayer& layer : plan.layers) {
        if (layer.key_size != first.key_size || layer.value_size != first.value_size) {
            return {};
        }
    }
    return first.value_size == first.key_size || first.value_size == 0
               ? std::to_string(first.key_size)
               : fmt::format("{}/{}", first.key_size, first.value_size);
}

ModelPlan::ModelPlan(const std::string& file) : path(file) {
    check_model_file(path);
    const LogCapture log;
    llama_model_params params = llama_model_default_params();
    ggml_backend_dev_t no_devices[1] = {nullptr};
    params.devices = no_devices;
    params.n_gpu_layers = 0;
    params.no_alloc = true;
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    params.progress_callback = [](float, void*) { return true; };
    handle_.reset(llama_model_load_from_file(path.c_str(), params));
    if (!handle_) {
        throw Error(fmt::format("{}: cannot be read: {}; check that the file is complete and that this libllama knows "
                                "its architecture",
                                path, log.reason("libllama gave no reason")));
    }
    llama_model* model = handle_.get();
    char text[256] = {};
    description = describe_model(model);
    if (llama_model_meta_val_str(model, "general.architecture", text, sizeof text) >= 0) {
        architecture = text;
    }
    if (llama_model_meta_val_str(model, "general.name", text, sizeof text) >= 0) {
        name = text;
    }
    parameters = llama_model_n_params(model);
    weight_bytes = static_cast<int64_t>(llama_model_size(model));
    trained_context = llama_model_n_ctx_train(model);
    layers = llama_model_n_layer(model);
    heads = llama_model_n_head(model);
    sliding_window = llama_model_n_swa(model);
    has_chat_template = llama_model_chat_template(model, nullptr) != nullptr;
    read_metadata();
}

void ModelPlan::read_metadata() {
    const std::unique_ptr<gguf_context, GgufDeleter> gguf(gguf_init_from_file(path.c_str(), {true, nullptr}));
    if (!gguf) {
        return; // libllama read the model all the same; shapes stay unknown and f16_scale makes up for it
    }
    for (int64_t key = 0; key < gguf_get_n_kv(gguf.get()); ++key) {
        std::string full = gguf_get_key(gguf.get(), key);
        if (full.rfind(architecture + ".", 0) == 0) {
            numbers_[full.substr(architecture.size() + 1)] = integers(gguf.get(), key);
        }
    }
}

CachePlan ModelPlan::dry_run(int64_t context) const {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(context);
    params.n_batch = 512;
    params.n_ubatch = 512;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.swa_full = false; // as Session does
    const LogCapture log;
    const std::unique_ptr<llama_context, decltype(&llama_free)> ctx(llama_init_from_model(handle_.get(), params),
                                                                    &llama_free);
    if (!ctx) {
        throw Error(
            fmt::format("{}: libllama cannot make a context of {} tokens for it: {}; use another model or --ctx", path,
                        context, log.reason("it gave no reason")));
    }
    const LoggedMemory memory = log.memory();
    CachePlan result;
    result.context = context;
    result.recurrent_layers = static_cast<int>(memory.recurrent_layers.size());
    result.recurrent_bytes = std::llround(memory.recurrent_mib * 1024 * 1024);
    result.compute_bytes = std::llround(memory.compute_mib * 1024 * 1024);

    // Key of the metadata, for one layer; arrays have an entry per layer.
    const auto number = [&](const char* key, int layer, int64_t otherwise) {
        const auto found = numbers_.find(key);
        if (found == numbers_.end() || found->second.empty()) {
            return otherwise;
        }
        const auto& values = found->second;
        return values.size() == 1                        ? values[0]
               : layer < static_cast<int>(values.size()) ? values[static_cast<size_t>(layer)]
                                                         : otherwise;
    };
    double logged_mib = 0;
    double shape_bytes = 0;
    for (const LoggedCache& cache : memory.caches) {
        logged_mib += cache.key_mib + cache.value_mib;
        for (const int index : cache.layers) {
            CacheLayer layer;
            layer.index = index;
            layer.sliding = cache.sliding;
            layer.cells = cache.cells;
            const int64_t n_head = number("attention.head_count", index, heads);
            layer.kv_heads = static_cast<int>(number("attention.head_count_kv", index, n_head));
            if (layer.kv_heads <= 0) {
                continue; // a layer without attention: libllama gives it a cache of no width
            }
            const int64_t plain = llama_model_n_embd(handle_.get()) / std::max<int64_t>(1, n_head);
            const int64_t key = number("attention.key_length", index, plain);
            const int64_t value = number("attention.value_length", index, plain);
            layer.key_size = static_cast<int>(cache.sliding ? number("attention.key_length_swa", index, key) : key);
            layer.value_size =
                static_cast<int>(cache.sliding ? number("attention.value_length_swa", index, value) : value);
            if (cache.value_mib == 0) {
                layer.value_size = 0;
            }
            shape_bytes +=
                2.0 * static_cast<double>(layer.cells) * layer.kv_heads * (layer.key_size + layer.value_size);
            result.layers.push_back(layer);
        }
    }
    const double logged_bytes = logged_mib * 1024 * 1024;
    // The log rounds each cache's K and V to 0.01 MiB.
    const double rounding = 0.011 * 1024 * 1024 * static_cast<double>(2 * memory.caches.size());
    if (shape_bytes > 0 && std::abs(logged_bytes - shape_bytes) > rounding) {
        result.f16_scale = logged_bytes / shape_bytes;
    }
    std::sort(result.layers.begin(), result.layers.end(),
              [](const CacheLayer& a, const CacheLayer& b) { return a.index < b.index; });
    return result;
}

const CachePlan& ModelPlan::measured(int64_t context) const {
    auto found = measured_.find(context);
    if (found == measured_.end()) {
        found = measured_.emplace(context, dry_run(context)).first;
    }
    return found->second;
}

CachePlan ModelPlan::plan(int64_t asked) const {
    const int64_t context = pad(std::clamp<int64_t>(asked, 1, kLongestContext));
    const int64_t longest = std::max(kLongestDryRun, pad(sliding_window + 1024));
    if (context <= longest) {
        return measured(context);
    }
    CachePlan result = measured(longest);
    const CachePlan& half = measured(pad(longest / 2));
    result.context = context;
    for (CacheLayer& layer : result.layers) {
        if (layer.cells == longest) { // grows with the context; a sliding window has stopped growing by now
            layer.cells = context;
        }
    }
    const double slope =
        static_cast<double>(result.compute_bytes - half.compute_bytes) / static_cast<double>(longest - half.context);
    result.compute_bytes += std::llround(std::max(0.0, slope) * static_cast<double>(context - longest));
    return result;
}

int64_t ModelPlan::total_bytes(const CachePlan& plan, const KvChoice& choice, int sequences) const {
    return weight_bytes + sequences * (kv_bytes(plan, choice) + plan.recurrent_bytes) + plan.compute_bytes;
}

int64_t ModelPlan::largest_context(const KvChoice& choice, int64_t available) const {
    const auto fits = [&](int64_t steps) { return total_bytes(plan(steps * kGranularity), choice) <= available; };
    if (!fits(1)) {
        return 0;
    }
    int64_t low = 1;
    int64_t high = kLongestContext / kGranularity;
    // Start where no dry run of its own is needed, so that the search costs two of them at most.
    const int64_t probe = std::max(kLongestDryRun, pad(sliding_window + 1024)) / kGranularity;
    if (fits(probe)) {
        low = probe;
    } else {
        high = probe;
    }
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return low * kGranularity;
}

int64_t choose_context(const ModelPlan& model, std::optional<int64_t> asked) {
    const int64_t trained = std::max(1, model.trained_context);
    if (!asked) {
        return std::min(trained, kDefaultContext);
    }
    return *asked == 0 ? trained : *asked;
}

void check_fit(const ModelPlan& model, const CachePlan& plan, const KvChoice& choice) {
    const FreeMemory memory = free_memory();
    const int64_t needed = model.total_bytes(plan, choice);
    if (memory.bytes < 0 || needed <= memory.bytes) {
        return;
    }
    const int64_t fitting = model.largest_context(choice, memory.bytes);
    const std::string advice = fitting > 0 ? fmt::format("use --ctx {} or less, or fewer bits (--kv tq3)", fitting)
                                           : std::string("use a smaller model");
    throw Error(fmt::format("{}: a context of {} needs {} (weights {}, {} cache {}, compute {}), {} leaves {}; {}",
                            model.path, format_count(plan.context), format_bytes(needed),
                            format_bytes(model.weight_bytes), choice.name, format_bytes(kv_bytes(plan, choice)),
                            format_bytes(plan.compute_bytes + plan.recurrent_bytes), memory.source,
                            format_bytes(memory.bytes), advice));
}

std::string format_bytes(int64_t bytes) {
    const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    auto value = static_cast<double>(bytes);
    int unit = 0;
    while (std::abs(value) >= 1000 && unit < 4) {
        value /= 1024;
        ++unit;
    }
    return unit == 0 ? fmt::format("{} B", bytes)
                     : fmt::format("{:.{}f} {}", value,
                                   value < 10    ? 2
                                   : value < 100 ? 1
                                                 : 0,
                                   units[unit]);
}

std::string format_count(int64_t count) {
    const std::string digits = std::to_string(count);
    std::string text;
    for (size_t i = 0; i < digits.size(); ++i) {
        if (i > 0 && (digits.size() - i) % 3 == 0 && digits[i - 1] != '-') {
            text += ',';
        }
        text += digits[i];
    }
    return text;
}

} // namespace turboquant::llm
