#include "llm/context.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/plugin.h"
#include "llm/sysinfo.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <ggml-cpu.h>

namespace turboquant::llm {
namespace {

constexpr int64_t kSpareOfWindow = 4; // a cut of a quarter of the exact rows is not worth reading all of them again

ggml_type find_type(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        const char* known = ggml_type_name(type);
        if (known != nullptr && name == known) {
            return type;
        }
    }
    throw Error(fmt::format("this libllama has no cache type {}; use --kv f16 or a preset", name));
}

// Bytes that the logged rows take in f16: the log counts them in the type of the cache.
double in_f16(double mib, const std::string& type_name) {
    const ggml_type type = find_type(type_name);
    return mib * 1024 * 1024 * 2 * static_cast<double>(ggml_blck_size(type)) /
           static_cast<double>(ggml_type_size(type));
}

// ggml's CPU back end may be loaded at run time, so its functions are asked for by name.
template <class Function>
Function cpu_function(const char* name) {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t registry = device == nullptr ? nullptr : ggml_backend_dev_backend_reg(device);
    return registry == nullptr ? nullptr
                               : reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(registry, name));
}

} // namespace

void ContextDeleter::operator()(llama_context* context) const {
    llama_free(context);
    if (threads_ != nullptr) {
        cpu_function<decltype(&ggml_threadpool_free)>("ggml_threadpool_free")(threads_);
    }
}

ContextHandle new_context(llama_model* model, const llama_context_params& params) {
    llama_context* const context = llama_init_from_model(model, params);
    ggml_threadpool_t threads = nullptr;
    const auto make = cpu_function<decltype(&ggml_threadpool_new)>("ggml_threadpool_new");
    const auto free = cpu_function<decltype(&ggml_threadpool_free)>("ggml_threadpool_free");
    if (context != nullptr && make != nullptr && free != nullptr) {
        ggml_threadpool_params pool =
            ggml_threadpool_params_default(std::max(params.n_threads, params.n_threads_batch));
        if (threads = make(&pool); threads != nullptr) {
            llama_attach_threadpool(context, threads, threads);
        }
    }
    return ContextHandle(context, ContextDeleter(threads));
}

Context make_context(const Model& model, const ContextOptions& options) {
    const KvChoice& kv = options.kv;
    if (kv.turboquant()) {
        configure_plugin(kv, shared_head_size(options.plan));
    }
    if (llama_model_has_encoder(model.get()) || !llama_model_has_decoder(model.get()) ||
        llama_model_is_diffusion(model.get())) {
        throw Error(fmt::format("{}: not a model that writes text token by token; use another one", model.path()));
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(options.plan.context * options.sequences);
    params.n_seq_max = static_cast<uint32_t>(options.sequences);
    // A stream for each sequence: its own window of exact rows, so that what one conversation writes never changes what
    // another one reads.
    params.kv_unified = false;
    params.n_batch = static_cast<uint32_t>(options.batch);
    params.n_ubatch = static_cast<uint32_t>(options.batch);
    params.n_threads = options.threads > 0 ? options.threads : default_threads();
    params.n_threads_batch = params.n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = kv.turboquant() ? GGML_TYPE_F16 : find_type(kv.host_type);
    params.type_v = params.type_k;
    params.offload_kqv = true;
    // Unless told otherwise sliding layers hold their window only; going back further reads again.
    params.swa_full = options.full_cache;
    params.no_perf = true;
    params.abort_callback = options.abort;
    params.abort_callback_data = options.abort_data;
    const LogCapture log;
    Context context;
    context.handle = new_context(model.get(), params);
    if (!context.handle) {
        throw Error(fmt::format("{}: no context of {}{} tokens with the {} cache: {}{}", model.path(),
                                options.sequences > 1 ? fmt::format("{} x ", options.sequences) : "",
                                options.plan.context, kv.name, log.reason("libllama gave no reason"),
                                kv.turboquant() ? "; --no-turboquant uses llama.cpp's own cache" : ""));
    }
    if (llama_get_memory(context.handle.get()) == nullptr) {
        throw Error(fmt::format("{}: not a model that writes text token by token; use another one", model.path()));
    }
    const LoggedMemory memory = log.memory();
    context.kv_bytes = std::llround(memory.kv_buffer_mib * 1024 * 1024);
    double f16 = 0;
    for (const LoggedCache& cache : memory.caches) {
        f16 += in_f16(cache.key_mib, cache.key_type) + in_f16(cache.value_mib, cache.value_type);
    }
    context.kv_f16_bytes = std::llround(f16);
    context.exact_rows = kv.exact_rows();
    context.window = options.full_cache ? 0 : llama_model_n_swa(model.get());
    return context;
}

int64_t Context::cut(llama_seq_id sequence, int64_t size, int64_t keep) const {
    // The latest rows before the cut were exact once, but the window has moved on with the rows that are cut off. Reading
    // them again makes them exact again, so that an answer does not lose what the cache's setting promises.
    if (size - keep > exact_rows / kSpareOfWindow) {
        keep -= exact_rows;
    }
    llama_memory_t memory = llama_get_memory(handle.get());
    // A sliding-window cache has forgotten what lies before its window: going back is only right as far as the window
    // of the first token to be read is still there.
    const bool forgotten =
        window > 0 && llama_memory_seq_pos_min(memory, sequence) > std::max<int64_t>(0, keep - window);
    const bool kept = keep > 0 && !forgotten && llama_memory_seq_rm(memory, sequence, static_cast<llama_pos>(keep), -1);
    return kept ? keep : 0;
}

} // namespace turboquant::llm
