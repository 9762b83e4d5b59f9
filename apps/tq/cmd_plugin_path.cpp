#include "commands.h"

#include "llm/plugin.h"

#include <fmt/format.h>

namespace turboquant::app {

Command add_plugin_path(CLI::App& program) {
    program.add_subcommand("plugin-path", "print the plug-in's path, for GGML_BACKEND_PATH=$(tq plugin-path)");
    return [] {
        fmt::print("{}\n", llm::find_plugin());
        return 0;
    };
}

} // namespace turboquant::app
