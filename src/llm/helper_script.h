// Python scripts that come with tq (share/turboquant beside bin/), for what Python's libraries do best: reading weights of
// every type, taking text out of packages.
#pragma once

#include "llm/model.h"

#include <string>
#include <vector>

namespace turboquant::llm {

// Runs a script (Python: TQ_PYTHON, else the one the build was told of, else python3) until it ends and returns what it
// gave as result. A script prints lines: "progress 0.25", "result TEXT"; when it fails, the last other line says why.
// Error: that line, or that Python or the script cannot be found.
std::string run_script(const std::string& name, const std::vector<std::string>& arguments, const Progress& progress);

// A copy of the model with all weights in F32, in the user's cache folder; made if it is not there yet. Its path.
std::string f32_copy(const std::string& model, const Progress& progress);

// A plain-text file in the user's cache folder; kind: "prose" or "code". Its path.
std::string sample_text(const std::string& kind);

} // namespace turboquant::llm
