// The ggml back end: registry entry, device, back end. ggml finds it through ggml_backend_init().
#include "abi.h"
#include "config.h"
#include "host.h"
#include "kv_buffer.h"
#include "ops.h"
#include "tuner.h"

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>

namespace turboquant::plugin {
namespace {

struct BackendContext {
    OpContext ops;
    ggml_abort_callback abort_callback = nullptr;
    void* abort_data = nullptr;
    bool placement_checked = false;
};

BackendContext& context_of(ggml_backend_t backend) {
    return *static_cast<BackendContext*>(backend->context);
}

// ---- back end --------------------------------------------------------------------------------------------------------

const char* backend_name(ggml_backend_t) {
    return "TQ0";
}

void backend_free(ggml_backend_t backend) {
    delete static_cast<BackendContext*>(backend->context);
    delete backend;
}

Status compute_node(BackendContext& context, const ggml_tensor* node) {
    switch (node->op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return {};
    case GGML_OP_SET_ROWS: return context.ops.set_rows(node);
    case GGML_OP_FLASH_ATTN_EXT: return context.ops.flash_attention(node);
    case GGML_OP_ROPE: return context.ops.rope(node);
    default:
        return {StatusCode::unsupported,
                std::string("the host sent the operation ") + ggml_op_name(node->op) + ", which was never offered"};
    }
}

ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph* graph) {
    BackendContext& context = context_of(backend);
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (context.abort_callback != nullptr && context.abort_callback(context.abort_data)) {
            return GGML_STATUS_ABORTED;
        }
        const ggml_tensor* node = ggml_graph_node(graph, i);
        Status status;
        try {
            status = compute_node(context, node);
        } catch (const std::bad_alloc&) {
            status = {StatusCode::out_of_memory, "out of memory: use a smaller context or batch"};
        } catch (const std::exception& error) {
            status = {StatusCode::internal, error.what()};
        }
        if (!status.ok()) {
            log_error(std::string(ggml_op_name(node->op)) + ": " + status.message());
            return status.code() == StatusCode::out_of_memory ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}

constexpr TqBackendInterface kBackendInterface = {
    .get_name = backend_name,
    .free = backend_free,
    .set_tensor_async = nullptr,
    .get_tensor_async = nullptr,
    .set_tensor_2d_async = nullptr,
    .get_tensor_2d_async = nullptr,
    .cpy_tensor_async = nullptr,
    .synchronize = nullptr,
    .graph_plan_create = nullptr,
    .graph_plan_free = nullptr,
    .graph_plan_update = nullptr,
    .graph_plan_compute = nullptr,
    .graph_compute = backend_graph_compute,
    .event_record = nullptr,
    .event_wait = nullptr,
    .graph_optimize = nullptr,
};

ggml_guid_t backend_guid() {
    static ggml_guid guid = {0x74, 0x75, 0x72, 0x62, 0x6f, 0x71, 0x75, 0x61,
                             0x6e, 0x74, 0x2e, 0x63, 0x70, 0x70, 0x00, 0x01};
    return &guid;
}

// Hosts call this before every batch, that is after the KV cache was allocated: the moment to notice that it went
// elsewhere.
void set_n_threads(ggml_backend_t backend, int n_threads) {
    BackendContext& context = context_of(backend);
    context.ops.set_threads(n_threads);
    if (!context.placement_checked) {
        context.placement_checked = true;
        if (live_kv_buffers() == 0) {
            log_warning("no KV cache was placed on the device TQ0, so nothing is compressed: give it all layers (-ngl "
                        "99, and no -nkvo; "
                        "llama-cpp-python: n_gpu_layers=-1, offload_kqv=True), or the model has no attention");
        }
    }
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data) {
    context_of(backend).abort_callback = callback;
    context_of(backend).abort_data = data;
}

// ---- device ----------------------------------------------------------------------------------------------------------

const char* device_name(ggml_backend_dev_t) {
    return "TQ0";
}
const char* device_description(ggml_backend_dev_t) {
    return "TurboQuant compressed KV cache " TURBOQUANT_VERSION;
}
void device_memory(ggml_backend_dev_t, size_t* free, size_t* total) {
    available_memory(free, total);
}
// Integrated, so that hosts without a GPU place all layers here by default, and hosts with one do not split the model
// over both.
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_IGPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
    std::memset(props, 0, sizeof *props);
    props->name = device_name(device);
    props->description = device_description(device);
    props->type = device_type(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->caps.mmap_support = true; // weights stay where the host maps them
}

ggml_backend_t device_init_backend(ggml_backend_dev_t device, const char* /*params*/) {
    auto context = std::make_unique<BackendContext>();
    return new ggml_backend{
        .guid = backend_guid(), .iface = kBackendInterface, .device = device, .context = context.release()};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) {
    return default_buffer_type();
}
bool device_supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
    return supports_op(op);
}
bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return buft == default_buffer_type() || buft == kv_buffer_type() || ggml_backend_buft_is_host(buft);
}

constexpr TqDeviceInterface kDeviceInterface = {
    .get_name = device_name,
    .get_description = device_description,
    .get_memory = device_memory,
    .get_type = device_type,
    .get_props = device_props,
    .init_backend = device_init_backend,
    .get_buffer_type = device_buffer_type,
    // The host gives its CPU back end this type for intermediate results, so both back ends share one type. Only then
    // does its scheduler move an attention here that no write to the cache precedes (layers that share another's rows);
    // it would run on the CPU otherwise, on copied bytes that mean nothing there.
    .get_host_buffer_type = device_buffer_type,
    .buffer_from_host_ptr = nullptr,
    .supports_op = device_supports_op,
    .supports_buft = device_supports_buft,
    .offload_op = nullptr,
    .event_new = nullptr,
    .event_free = nullptr,
    .event_synchronize = nullptr,
};

// ---- registry --------------------------------------------------------------------------------------------------------

const char* reg_name(ggml_backend_reg_t) {
    return "TurboQuant";
}
size_t reg_device_count(ggml_backend_reg_t) {
    return 1;
}

ggml_backend_device g_device;

ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t index) {
    return index == 0 ? &g_device : nullptr;
}

void* reg_proc_address(ggml_backend_reg_t, const char* name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void*>(&set_n_threads);
    }
    if (std::strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void*>(&set_abort_callback);
    }
    if (std::strcmp(name, "turboquant_tune_start") == 0) {
        return reinterpret_cast<void*>(&turboquant_tune_start);
    }
    if (std::strcmp(name, "turboquant_tune_write") == 0) {
        return reinterpret_cast<void*>(&turboquant_tune_write);
    }
    return nullptr;
}

ggml_backend_reg g_reg = {
    .api_version = kGgmlBackendApiVersion,
    .iface = {.get_name = reg_name,
              .get_device_count = reg_device_count,
              .get_device = reg_device,
              .get_proc_address = reg_proc_address},
    .context = nullptr,
};

} // namespace
} // namespace turboquant::plugin

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    using namespace turboquant::plugin;
    try {
        if (const turboquant::Status status = probe_host(); !status.ok()) {
            log_error(status.message());
            return nullptr;
        }
        Config config;
        std::string unknown;
        if (const turboquant::Status status = read_config(config, unknown); !status.ok()) {
            log_error(status.message()); // settings are read again for each context, which then refuses
        }
    } catch (const std::exception& error) {
        log_error(error.what());
        return nullptr;
    }
    g_device = {.iface = kDeviceInterface, .reg = &g_reg, .context = nullptr};
    init_buffer_types(&g_device);
    return &g_reg;
}
