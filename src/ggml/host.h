// What the plug-in needs to know of the program that loaded it, and the few of its functions that are found by name.
#pragma once

#include "abi.h"
#include "turboquant/status.h"

#include <string>

namespace turboquant::plugin {

// One line through the host's log (level info, warning or error), prefixed "turboquant: ".
void log_info(const std::string& message);
void log_warning(const std::string& message);
void log_error(const std::string& message);

// Compares the layouts in abi.h with the running host by reading its CPU device, buffer type, buffer and back end
// through them and through the host's public functions. An error names the first difference and the ggml version.
// A version that passes without having been tested gets a warning line.
Status probe_host();

// The host's CPU device, found through the registry it uses; null if it has none.
ggml_backend_dev_t cpu_device();

// Debug builds of ggml assert that no tensor is allocated less than its uncompressed size. True if the host is one.
bool host_asserts_sizes();

// Memory that a new cache may take: MemAvailable or the control group's limit less what it uses, and the total.
void available_memory(size_t* free, size_t* total);

} // namespace turboquant::plugin
