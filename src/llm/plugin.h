// The TurboQuant plug-in as a ggml back end: where its library is, loading it, telling it which cache to make.
#pragma once

#include "llm/kv_choice.h"

#include <string>

#include <ggml-backend.h>

namespace turboquant::llm {

// The library's path: TURBOQUANT_PLUGIN, else beside this program (../lib in a build tree, ../lib/turboquant where
// installed). Error says where it was looked for.
std::string find_plugin();

// Loads the plug-in (once per process) and returns its device TQ0. Error when it cannot be loaded, with its reason.
ggml_backend_dev_t load_plugin();

// Sets the TURBOQUANT_* variables that the plug-in reads when a context is made, TURBOQUANT_PROFILE too (unset where the
// choice has none). head_size: "64" or "576/512", empty
// where layers differ or nothing is known. Not thread-safe (environment).
void configure_plugin(const KvChoice& choice, const std::string& head_size);

} // namespace turboquant::llm
