// One function per command: adds it to the program and keeps what it was told until it runs.
#pragma once

#include <functional>

#include <CLI/CLI.hpp>

namespace turboquant::app {

// Runs the command; the exit status. Throws llm::Error.
using Command = std::function<int()>;

Command add_run(CLI::App& program);
Command add_chat(CLI::App& program);
Command add_serve(CLI::App& program);
Command add_info(CLI::App& program);
Command add_demo(CLI::App& program);
Command add_eval(CLI::App& program);
Command add_tune(CLI::App& program);
Command add_bench(CLI::App& program);
Command add_plugin_path(CLI::App& program);

} // namespace turboquant::app
