#include "kv_buffer.h"

#include "host.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <sys/mman.h>

namespace turboquant::plugin {
namespace {

constexpr size_t kAlignment = 128;

ggml_backend_buffer_type g_default_type; // made once in init_buffer_types, constant afterwards
ggml_backend_buffer_type g_kv_type;
std::atomic<int> g_live_kv_buffers{0};

// "cache_k_l<N>" or "cache_v_l<N>". Caches with another name (recurrent state, indexers) stay plain.
bool parse_kv_name(std::string_view name, Side& side, int* layer = nullptr) {
    constexpr size_t kMostDigits = 6;
    if (name.substr(0, 6) != "cache_" || name.size() < 10 || name.substr(7, 2) != "_l" ||
        (name[6] != 'k' && name[6] != 'v')) {
        return false;
    }
    side = name[6] == 'k' ? Side::key : Side::value;
    const std::string_view digits = name.substr(9);
    if (digits.size() > kMostDigits ||
        !std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; })) {
        return false;
    }
    if (layer != nullptr) {
        *layer = std::atoi(std::string(digits).c_str());
    }
    return true;
}

bool plain_type(ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; // fp32 is cast before attention, which reads the cache
}

const ggml_tensor* root_of(const ggml_tensor* tensor) {
    while (tensor != nullptr && tensor->view_src != nullptr) {
        tensor = tensor->view_src;
    }
    return tensor;
}

// A host sizes all tensors of a buffer, then allocates it: alloc_buffer itself is told the sum only. So the sizes given
// out for KV tensors are kept, per thread, until something else is sized or allocated. The host sizes tensors again
// while placing them; the sum must match the latest ones, which that does not upset.
struct Sizing {
    struct Entry {
        size_t padded;
        ggml_type type;
    };
    std::vector<Entry> entries;
};
thread_local Sizing t_sizing;

bool sizing_matches(size_t size, ggml_type& refused) {
    size_t sum = 0;
    refused = GGML_TYPE_F16;
    for (size_t i = t_sizing.entries.size(); i-- > 0;) { // the latest first
        const auto& entry = t_sizing.entries[i];
        sum += entry.padded;
        if (!plain_type(entry.type)) {
            refused = entry.type;
        }
        if (sum == size) {
            return true;
        }
        if (sum > size) {
            return false;
        }
    }
    return false;
}

KvBuffer* context_of(ggml_backend_buffer_t buffer) {
    return static_cast<KvBuffer*>(buffer->context);
}

struct TensorRange {
    KvTensor* tensor;
    size_t offset; // from the root tensor's start
};
TensorRange range_of(const ggml_tensor* tensor, size_t offset) {
    const ggml_tensor* root = root_of(tensor);
    return {static_cast<KvTensor*>(root->extra), (tensor->view_src != nullptr ? tensor->view_offs : 0) + offset};
}

// ---- buffer --------------------------------------------------------------------------------------------------------

void buffer_free(ggml_backend_buffer_t buffer) {
    KvBuffer* kv = context_of(buffer);
    if (kv->base != nullptr) {
        munmap(kv->base, kv->size);
    }
    delete kv;
    --g_live_kv_buffers;
}

void* buffer_base(ggml_backend_buffer_t buffer) {
    return context_of(buffer)->base;
}

ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
    Side side = Side::key;
    if (tensor->view_src != nullptr) {
        return GGML_STATUS_SUCCESS;
    }
    int layer = 0;
    if (!parse_kv_name(tensor->name, side, &layer)) {
        log_error("the host puts " + std::string(tensor->name) + " into a KV buffer");
        return GGML_STATUS_FAILED;
    }
    KvBuffer* kv = context_of(buffer);
    const std::lock_guard lock(kv->mutex);
    const LayerProfile* profile = kv->profile == nullptr ? nullptr : kv->profile->find(layer);
    if (profile != nullptr && side == Side::key && tensor->ne[0] != 0 &&
        tensor->ne[0] != int64_t{profile->head_size} * profile->kv_heads) {
        log_error("layer " + std::to_string(layer) + " of the profile '" + kv->config.profile + "' has " +
                  std::to_string(profile->kv_heads) + " KV heads of " + std::to_string(profile->head_size) +
                  ", the model's keys have " + std::to_string(tensor->ne[0]) +
                  " elements: the profile is of another model; run `tq tune` for this one");
        return GGML_STATUS_FAILED;
    }
    kv->tensors.push_back(std::make_unique<KvTensor>(*tensor, side, layer, kv->config.in_layer(profile), profile));
    tensor->extra = kv->tensors.back().get();
    return GGML_STATUS_SUCCESS;
}

void report(const Status& status) {
    if (!status.ok()) {
        log_error(status.message());
    }
}

void buffer_memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor, uint8_t value, size_t offset,
                          size_t size) {
    const std::lock_guard lock(context_of(buffer)->mutex);
    const TensorRange range = range_of(tensor, offset);
    if (value != 0) {
        report(invalid(range.tensor->name() + ": the host fills it with bytes other than zero; ignored"));
        return;
    }
    report(range.tensor->zero_bytes(range.offset, size));
}

void buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data, size_t offset,
                       size_t size) {
    const std::lock_guard lock(context_of(buffer)->mutex);
    const TensorRange range = range_of(tensor, offset);
    const Status status = range.tensor->write_bytes(range.offset, size, static_cast<const uint8_t*>(data));
    if (!status.ok()) {
        // The host has no way to hear of it here; the rows concerned keep what they held.
        log_error("restoring rows: " + status.message());
    }
}

void buffer_get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor* tensor, void* data, size_t offset,
                       size_t size) {
    const std::lock_guard lock(context_of(buffer)->mutex);
    const TensorRange range = range_of(tensor, offset);
    report(range.tensor->read_bytes(range.offset, size, static_cast<uint8_t*>(data)));
}

// Whole streams between tensors of ours, on codes. Everything else: false, and the host goes through bytes.
bool buffer_copy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor* source, ggml_tensor* target) {
    const KvRef from = find_kv(source);
    const KvRef to = find_kv(target);
    if (from.tensor == nullptr || to.tensor == nullptr || to.buffer != context_of(buffer)) {
        return false;
    }
    const size_t stream_bytes = from.tensor->row_bytes() * static_cast<size_t>(from.tensor->cells());
    const size_t from_offset = source->view_src != nullptr ? source->view_offs : 0;
    const size_t to_offset = target->view_src != nullptr ? target->view_offs : 0;
    if (ggml_nbytes(source) != stream_bytes || ggml_nbytes(target) != stream_bytes || from_offset % stream_bytes != 0 ||
        to_offset % stream_bytes != 0 || from.tensor->elements() != to.tensor->elements() ||
        from.tensor->cells() != to.tensor->cells()) {
        return false;
    }
    std::unique_lock lock(to.buffer->mutex, std::defer_lock);
    std::unique_lock other(from.buffer->mutex, std::defer_lock);
    if (to.buffer == from.buffer) {
        lock.lock();
    } else {
        std::lock(lock, other);
    }
    const Status status = to.tensor->copy_stream(*from.tensor, static_cast<int64_t>(from_offset / stream_bytes),
                                                 static_cast<int64_t>(to_offset / stream_bytes));
    return status.ok();
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t /*value: any means "forget"*/) {
    KvBuffer* kv = context_of(buffer);
    const std::lock_guard lock(kv->mutex);
    for (auto& tensor : kv->tensors) {
        tensor->clear();
    }
}

constexpr TqBufferInterface kBufferInterface = {
    .free_buffer = buffer_free,
    .get_base = buffer_base,
    .init_tensor = buffer_init_tensor,
    .memset_tensor = buffer_memset_tensor,
    .set_tensor = buffer_set_tensor,
    .get_tensor = buffer_get_tensor,
    .set_tensor_2d = nullptr,
    .get_tensor_2d = nullptr,
    .cpy_tensor = buffer_copy_tensor,
    .clear = buffer_clear,
    .reset = nullptr,
};

// ---- buffer types --------------------------------------------------------------------------------------------------

const char* default_type_name(ggml_backend_buffer_type_t) {
    return "TQ0";
}
const char* kv_type_name(ggml_backend_buffer_type_t) {
    return "TurboQuant";
}

ggml_backend_buffer_t allocate_kv(size_t size) {
    auto kv = std::make_unique<KvBuffer>();
    std::string unknown;
    if (Status status = read_config(kv->config, unknown); !status.ok()) {
        log_error(status.message());
        return nullptr;
    }
    if (!unknown.empty()) {
        log_error("unknown settings " + unknown +
                  ": known are TURBOQUANT_KV, _PROFILE, _CALIBRATE, _WINDOW, _SINKS, _SINK_SEQUENCES, _HEAD_SIZE, "
                  "_ISA; correct or unset them");
        return nullptr;
    }
    if (Status status = load_profile(kv->config, kv->profile); !status.ok()) {
        log_error(status.message());
        return nullptr;
    }
    // Address space for the host's arithmetic on tensor addresses; nothing is ever stored in it.
    void* base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        log_error("no address space for a KV cache of " + std::to_string(size) + " bytes: use a smaller context");
        return nullptr;
    }
    kv->base = base;
    kv->size = size;
    log_info("KV cache: " + kv->config.summary() + " (" + std::string(isa_name(kv->config.isa)) + ")" +
             (kv->profile == nullptr ? "" : ", profile " + kv->config.profile));
    if (host_asserts_sizes()) {
        log_info("this is a debug build of ggml: the KV size it reports is that of the uncompressed cache; the memory "
                 "used is the "
                 "compressed one");
    }
    ++g_live_kv_buffers;
    return ggml_backend_buffer_init(&g_kv_type, kBufferInterface, kv.release(), size);
}

ggml_backend_buffer_t type_alloc_buffer(ggml_backend_buffer_type_t, size_t size) {
    ggml_type refused = GGML_TYPE_F16;
    const bool is_kv = sizing_matches(size, refused);
    t_sizing.entries.clear();
    if (!is_kv) {
        return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    }
    if (!plain_type(refused)) {
        log_error(
            "the host was told to store the KV cache as " + std::string(ggml_type_name(refused)) +
            ", but TurboQuant is to store it: leave the cache types at f16 (-ctk f16 -ctv f16) and choose bits with "
            "TURBOQUANT_KV");
        return nullptr;
    }
    return allocate_kv(size);
}

size_t type_alignment(ggml_backend_buffer_type_t) {
    return kAlignment;
}

size_t type_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor* tensor) {
    const size_t plain = ggml_nbytes(tensor);
    Side side = Side::key;
    int layer = 0;
    if (tensor->view_src != nullptr || !parse_kv_name(tensor->name, side, &layer)) {
        if (tensor->view_src == nullptr) {
            t_sizing.entries.clear();
        }
        return plain;
    }
    size_t bytes = plain;
    if (plain_type(tensor->type)) {
        Config config;
        std::string unknown;
        std::shared_ptr<const Profile> profile;
        // A wrong setting is reported when the buffer is allocated; here there is no way to refuse.
        if (read_config(config, unknown).ok() && load_profile(config, profile).ok()) {
            const LayerProfile* in_profile = profile == nullptr ? nullptr : profile->find(layer);
            if (!KvTensor::reserve_bytes(*tensor, side, config.in_layer(in_profile), bytes).ok()) {
                bytes = plain;
            }
        }
        if (host_asserts_sizes()) {
            bytes = std::max(bytes, plain);
        }
    }
    t_sizing.entries.push_back({(bytes + kAlignment - 1) / kAlignment * kAlignment, tensor->type});
    return bytes;
}

bool yes_host(ggml_backend_buffer_type_t) {
    return true;
}
bool not_host(ggml_backend_buffer_type_t) {
    return false;
}

} // namespace

void init_buffer_types(ggml_backend_dev_t device) {
    const TqBufferTypeInterface common = {
        .get_name = default_type_name,
        .alloc_buffer = type_alloc_buffer,
        .get_alignment = type_alignment,
        .get_max_size = nullptr,
        .get_alloc_size = type_alloc_size,
        .is_host = yes_host, // its buffers other than KV are host memory: no copies between back ends
    };
    g_default_type = {.iface = common, .device = device, .context = nullptr};
    g_kv_type = {.iface = common, .device = device, .context = nullptr};
    g_kv_type.iface.get_name = kv_type_name;
    g_kv_type.iface.is_host = not_host;
}

ggml_backend_buffer_type_t default_buffer_type() {
    return &g_default_type;
}
ggml_backend_buffer_type_t kv_buffer_type() {
    return &g_kv_type;
}
int live_kv_buffers() {
    return g_live_kv_buffers;
}

void report_sources(KvBuffer& buffer) {
    int calibrating = 0; // tensors that began so
    int waiting = 0;
    int unknown = 0;
    int from_rows = 0;
    int with_profile = 0;
    int checked = 0;
    int doubtful = 0;
    for (const auto& tensor : buffer.tensors) {
        const KeySource& source = tensor->key_source();
        if (tensor->head_size() == 0) {
            continue; // in no graph
        }
        calibrating += source.calibrates();
        waiting += source.state() == KeySource::State::waiting;
        unknown += source.state() == KeySource::State::unknown;
        from_rows += source.state() == KeySource::State::rows;
        with_profile += source.state() == KeySource::State::profile;
        checked += source.checked();
        doubtful += source.doubtful();
    }
    if (!buffer.calibration_reported && calibrating > 0 && waiting == 0) {
        buffer.calibration_reported = true;
        if (from_rows > 0) {
            log_info("keys are conditioned from the first " + std::to_string(KeySource::kCalibrationRows) +
                     " rows of this cache (" + std::to_string(from_rows) + " layers)");
        }
        if (unknown > 0) {
            log_info(
                "keys of " + std::to_string(unknown) +
                " layers are not conditioned: this host's graph does not show how they turn with their position; a "
                "profile (`tq tune`, TURBOQUANT_PROFILE) would make them more exact");
        }
    }
    if (!buffer.profile_reported && with_profile > 0 && checked == with_profile) {
        buffer.profile_reported = true;
        if (2 * doubtful > checked) {
            log_warning("the profile '" + buffer.config.profile +
                        "' does not seem to be of this model (its means leave more of the keys of " +
                        std::to_string(doubtful) + " of " + std::to_string(checked) +
                        " layers than there was): run `tq tune`");
        }
    }
}

KvRef find_kv(const ggml_tensor* tensor) {
    const ggml_tensor* root = root_of(tensor);
    if (root == nullptr || root->buffer == nullptr) {
        return {};
    }
    if (root->buffer->buft == &g_kv_type) { // holds nothing else (buffer_init_tensor)
        return {true, context_of(root->buffer), static_cast<KvTensor*>(root->extra)};
    }
    // The host's dummy buffer while it only measures what a context would need.
    Side side = Side::key;
    const bool measured = root->buffer->buft == &g_default_type && root->buffer->context == nullptr;
    return {measured && parse_kv_name(root->name, side), nullptr, nullptr};
}

} // namespace turboquant::plugin
