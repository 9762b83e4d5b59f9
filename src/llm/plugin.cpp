#include "llm/plugin.h"

#include "llm/error.h"
#include "llm/log.h"

#include <cstdlib>
#include <filesystem>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

namespace fs = std::filesystem;
constexpr const char* kLibrary = "libggml-turboquant.so";
constexpr const char* kDevice = "TQ0";

} // namespace

std::string find_plugin() {
    std::error_code ignored;
    if (const char* path = std::getenv("TURBOQUANT_PLUGIN"); path != nullptr && *path != '\0') {
        if (!fs::is_regular_file(path, ignored)) {
            throw Error(fmt::format("TURBOQUANT_PLUGIN={}: no such file; set it to the path of {}, or unset it", path,
                                    kLibrary));
        }
        return path;
    }
    const fs::path lib = fs::read_symlink("/proc/self/exe", ignored).parent_path().parent_path() / "lib";
    for (const fs::path& path : {lib / kLibrary, lib / "turboquant" / kLibrary}) {
        if (fs::is_regular_file(path, ignored)) {
            return path.string();
        }
    }
    throw Error(fmt::format("{}: not found in {} or {}/turboquant; build it (make), set TURBOQUANT_PLUGIN to its path, "
                            "or use --no-turboquant",
                            kLibrary, lib.string(), lib.string()));
}

ggml_backend_dev_t load_plugin() {
    if (ggml_backend_dev_t device = ggml_backend_dev_by_name(kDevice)) {
        return device;
    }
    const std::string path = find_plugin();
    const LogCapture log;
    if (ggml_backend_load(path.c_str()) == nullptr) {
        throw Error(fmt::format("{}: cannot be loaded: {}; rebuild it against this libllama, or use --no-turboquant",
                                path, log.reason("ggml gave no reason")));
    }
    ggml_backend_dev_t device = ggml_backend_dev_by_name(kDevice);
    if (device == nullptr) {
        throw Error(fmt::format("{}: loaded, but offers no device {}: {}; use --no-turboquant", path, kDevice,
                                log.reason("it gave no reason")));
    }
    return device;
}

void configure_plugin(const KvChoice& choice, const std::string& head_size) {
    ::setenv("TURBOQUANT_KV", choice.bits().c_str(), 1);
    ::setenv("TURBOQUANT_WINDOW", std::to_string(choice.window).c_str(), 1);
    ::setenv("TURBOQUANT_SINKS", std::to_string(choice.sinks).c_str(), 1);
    ::setenv("TURBOQUANT_SINK_SEQUENCES", "1", 1); // tq has one sequence a context
    if (choice.profile.empty()) {
        ::unsetenv("TURBOQUANT_PROFILE");
    } else {
        ::setenv("TURBOQUANT_PROFILE", choice.profile.c_str(), 1);
    }
    static const char* const calibrate =
        std::getenv("TURBOQUANT_CALIBRATE"); // the user's, for choices that say nothing
    static const std::string users = calibrate == nullptr ? "" : calibrate;
    if (choice.calibrate || !users.empty()) {
        ::setenv("TURBOQUANT_CALIBRATE", choice.calibrate ? (*choice.calibrate ? "on" : "off") : users.c_str(), 1);
    } else {
        ::unsetenv("TURBOQUANT_CALIBRATE");
    }
    if (head_size.empty()) {
        ::unsetenv("TURBOQUANT_HEAD_SIZE");
    } else {
        ::setenv("TURBOQUANT_HEAD_SIZE", head_size.c_str(), 1);
    }
}

} // namespace turboquant::llm
