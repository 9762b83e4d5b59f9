// The memory layout of ggml's back-end objects for GGML_BACKEND_API_VERSION 2. ggml does not install the header that
// defines them, yet a plug-in must hand such objects over; these are the facts it states, in one place of our own.
// host_probe.h checks them against the running host before the plug-in offers itself.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>

inline constexpr int kGgmlBackendApiVersion = 2;

struct TqBufferTypeInterface {
    const char* (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);                       // optional
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor*); // optional
    bool (*is_host)(ggml_backend_buffer_type_t);                              // optional
};

struct ggml_backend_buffer_type {
    TqBufferTypeInterface iface;
    ggml_backend_dev_t device;
    void* context;
};

struct TqBufferInterface {
    void (*free_buffer)(ggml_backend_buffer_t); // optional
    void* (*get_base)(ggml_backend_buffer_t);
    ggml_status (*init_tensor)(ggml_backend_buffer_t, ggml_tensor*); // optional
    void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor*, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor*, const void* data, size_t offset, size_t size);
    void (*get_tensor)(ggml_backend_buffer_t, const ggml_tensor*, void* data, size_t offset, size_t size);
    void (*set_tensor_2d)(ggml_backend_buffer_t, ggml_tensor*, const void* data, size_t offset, size_t size,
                          size_t n_copies, size_t stride_tensor, size_t stride_data); // optional
    void (*get_tensor_2d)(ggml_backend_buffer_t, const ggml_tensor*, void* data, size_t offset, size_t size,
                          size_t n_copies, size_t stride_tensor, size_t stride_data);    // optional
    bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor* src, ggml_tensor* dst); // optional
    void (*clear)(ggml_backend_buffer_t, uint8_t value);
    void (*reset)(ggml_backend_buffer_t); // optional
};

struct ggml_backend_buffer {
    TqBufferInterface iface;
    ggml_backend_buffer_type_t buft;
    void* context;
    size_t size;
    ggml_backend_buffer_usage usage;
};

struct TqBackendInterface {
    const char* (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    // Asynchronous transfers: optional, unused here.
    void* set_tensor_async;
    void* get_tensor_async;
    void* set_tensor_2d_async;
    void* get_tensor_2d_async;
    void* cpy_tensor_async;
    void (*synchronize)(ggml_backend_t); // optional
    // Graph plans: optional, unused here.
    void* graph_plan_create;
    void* graph_plan_free;
    void* graph_plan_update;
    void* graph_plan_compute;
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph*);
    // Events and graph rewriting: optional, unused here.
    void* event_record;
    void* event_wait;
    void* graph_optimize;
};

struct ggml_backend {
    ggml_guid_t guid;
    TqBackendInterface iface;
    ggml_backend_dev_t device;
    void* context;
};

struct TqDeviceInterface {
    const char* (*get_name)(ggml_backend_dev_t);
    const char* (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t* free, size_t* total);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props*);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char* params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t); // optional
    void* buffer_from_host_ptr;                                             // optional, unused here
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor* op);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    bool (*offload_op)(ggml_backend_dev_t, const ggml_tensor* op); // optional
    void* event_new;                                               // events: optional, unused here
    void* event_free;
    void* event_synchronize;
};

struct ggml_backend_device {
    TqDeviceInterface iface;
    ggml_backend_reg_t reg;
    void* context;
};

struct TqRegInterface {
    const char* (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t index);
    void* (*get_proc_address)(ggml_backend_reg_t, const char* name); // optional
};

struct ggml_backend_reg {
    int api_version;
    TqRegInterface iface;
    void* context;
};

extern "C" {
// Exported by libggml-base though not declared in an installed header. The host deletes what the first one makes.
ggml_backend_buffer_t ggml_backend_buffer_init(ggml_backend_buffer_type_t buft, TqBufferInterface iface, void* context,
                                               size_t size);
void ggml_log_internal(ggml_log_level level, const char* format, ...);
}
