#include "host.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <link.h>
#include <string_view>

namespace turboquant::plugin {
namespace {

constexpr std::array<std::string_view, 1> kTestedVersions = {"0.25.3"};

// The registry lives in libggml, which this plug-in does not link (a wheel may hold two copies of it; the one that the
// host's libllama uses is the one already loaded). So its functions are looked up in what is loaded.
template <class Function>
Function registry_function(const char* name) {
    if (void* symbol = dlsym(RTLD_DEFAULT, name)) {
        return reinterpret_cast<Function>(symbol);
    }
    struct Search {
        const char* name;
        void* symbol;
    } search = {name, nullptr};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto* found = static_cast<Search*>(data);
            const std::string_view path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
            const std::string_view file = path.substr(path.rfind('/') + 1);
            if (file.substr(0, 10) != "libggml.so" && file != "libggml.dylib") {
                return 0;
            }
            if (void* handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD)) {
                found->symbol = dlsym(handle, found->name);
                dlclose(handle); // NOLOAD took a reference; the host keeps its own
            }
            return found->symbol != nullptr ? 1 : 0;
        },
        &search);
    return reinterpret_cast<Function>(search.symbol);
}

Status mismatch(const std::string& what) {
    return {StatusCode::unsupported,
            "this host's ggml " + std::string(ggml_version()) + " lays out its " + what +
                " differently from what this plug-in was built for (ggml 0.25, back-end API 2): update "
                "turboquant.cpp or use a tested llama.cpp; nothing was loaded"};
}

std::string file_of(void* symbol) {
    Dl_info info;
    return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

size_t meminfo_bytes(std::string_view key) {
    std::ifstream file("/proc/meminfo");
    std::string name;
    size_t kib = 0;
    std::string unit;
    while (file >> name >> kib) {
        std::getline(file, unit);
        if (name == key) {
            return kib * 1024;
        }
    }
    return 0;
}

// A number in a file of its own, or `otherwise` ("max", missing).
size_t number_in(const char* path, size_t otherwise) {
    std::ifstream file(path);
    size_t value = 0;
    return file >> value ? value : otherwise;
}

} // namespace

void log_info(const std::string& message) {
    ggml_log_internal(GGML_LOG_LEVEL_INFO, "turboquant: %s\n", message.c_str());
}
void log_warning(const std::string& message) {
    ggml_log_internal(GGML_LOG_LEVEL_WARN, "turboquant: %s\n", message.c_str());
}
void log_error(const std::string& message) {
    ggml_log_internal(GGML_LOG_LEVEL_ERROR, "turboquant: %s\n", message.c_str());
}

ggml_backend_dev_t cpu_device() {
    using ByType = ggml_backend_dev_t (*)(enum ggml_backend_dev_type);
    const auto by_type = registry_function<ByType>("ggml_backend_dev_by_type");
    return by_type == nullptr ? nullptr : by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

Status probe_host() {
    if (const char* forced = std::getenv("TURBOQUANT_HOST_CHECK");
        forced != nullptr && std::strcmp(forced, "fail") == 0) {
        return mismatch("back-end objects (TURBOQUANT_HOST_CHECK=fail asked for this answer)");
    }
    // A buffer type and a buffer first: they need no registry.
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    if (buft->iface.get_name == nullptr || std::strcmp(buft->iface.get_name(buft), ggml_backend_buft_name(buft)) != 0 ||
        buft->iface.get_alignment(buft) != ggml_backend_buft_get_alignment(buft) || buft->iface.is_host == nullptr ||
        buft->iface.is_host(buft) != ggml_backend_buft_is_host(buft) ||
        buft->device != ggml_backend_buft_get_device(buft)) {
        return mismatch("buffer types");
    }
    constexpr size_t kProbeBytes = 4096;
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, kProbeBytes);
    if (buffer == nullptr) {
        return {StatusCode::out_of_memory, "the host cannot allocate 4 KiB"};
    }
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const bool buffer_fits = buffer->buft == buft && buffer->size == ggml_backend_buffer_get_size(buffer) &&
                             buffer->usage == GGML_BACKEND_BUFFER_USAGE_COMPUTE && buffer->iface.get_base != nullptr &&
                             buffer->iface.get_base(buffer) == ggml_backend_buffer_get_base(buffer) &&
                             buffer->iface.clear != nullptr && buffer->iface.set_tensor != nullptr &&
                             buffer->iface.get_tensor != nullptr;
    ggml_backend_buffer_free(buffer);
    if (!buffer_fits) {
        return mismatch("buffers");
    }
    ggml_backend_dev_t device = cpu_device();
    if (device == nullptr) {
        return {StatusCode::unsupported, "the host has no CPU back end in a shared libggml (ggml linked statically?): "
                                         "use a llama.cpp built with shared "
                                         "libraries"};
    }
    size_t free = 0;
    size_t total = 0;
    ggml_backend_dev_memory(device, &free, &total);
    size_t free_here = 0;
    size_t total_here = 0;
    device->iface.get_memory(device, &free_here, &total_here);
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device, &props);
    if (std::strcmp(device->iface.get_name(device), ggml_backend_dev_name(device)) != 0 ||
        std::strcmp(device->iface.get_description(device), ggml_backend_dev_description(device)) != 0 ||
        total_here != total || device->iface.get_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU ||
        device->reg != ggml_backend_dev_backend_reg(device) || props.type != GGML_BACKEND_DEVICE_TYPE_CPU ||
        props.memory_total != total || device->iface.get_buffer_type(device) != ggml_backend_dev_buffer_type(device) ||
        device->iface.supports_buft(device, buft) != ggml_backend_dev_supports_buft(device, buft)) {
        return mismatch("devices");
    }
    if (device->reg->api_version != kGgmlBackendApiVersion ||
        std::strcmp(device->reg->iface.get_name(device->reg), ggml_backend_reg_name(device->reg)) != 0 ||
        device->reg->iface.get_device_count(device->reg) != ggml_backend_reg_dev_count(device->reg)) {
        return mismatch("back-end registry");
    }
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    if (backend == nullptr) {
        return {StatusCode::unsupported, "the host's CPU back end does not start"};
    }
    const bool backend_fits = backend->device == device && backend->guid == ggml_backend_guid(backend) &&
                              std::strcmp(backend->iface.get_name(backend), ggml_backend_name(backend)) == 0 &&
                              backend->iface.graph_compute != nullptr;
    ggml_backend_free(backend);
    if (!backend_fits) {
        return mismatch("back ends");
    }
    if (std::find(kTestedVersions.begin(), kTestedVersions.end(), ggml_version()) == kTestedVersions.end()) {
        log_warning("ggml " + std::string(ggml_version()) +
                    " was not tested with this plug-in (tested: 0.25.3); its layouts look right, "
                    "going on");
    }
    return {};
}

bool host_asserts_sizes() {
    // assert() leaves a reference to __assert_fail; a release build of ggml-base (NDEBUG) has none.
    static const bool asserts = [] {
        std::ifstream file(file_of(reinterpret_cast<void*>(&ggml_backend_buft_get_alloc_size)), std::ios::binary);
        const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        return bytes.find("__assert_fail") != std::string::npos;
    }();
    return asserts;
}

void available_memory(size_t* free, size_t* total) {
    size_t available = meminfo_bytes("MemAvailable:");
    size_t all = meminfo_bytes("MemTotal:");
    const size_t limit = number_in("/sys/fs/cgroup/memory.max", all);
    const size_t used = number_in("/sys/fs/cgroup/memory.current", 0);
    all = std::min(all, limit);
    if (limit < SIZE_MAX && limit > used) {
        available = std::min(available, limit - used);
    }
    // The host sizes weights and buffers of other back ends from the same memory: leave them a tenth. Never 0/0, which
    // hosts read as "no memory known" and then place nothing here.
    available -= available / 10;
    *free = std::max<size_t>(available, 1 << 20);
    *total = std::max<size_t>(all, *free);
}

} // namespace turboquant::plugin
