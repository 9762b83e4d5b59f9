#include "config.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <system_error>

extern char** environ; // POSIX

namespace turboquant::plugin {
namespace {

struct Preset {
    std::string_view name;
    int key_bits, value_bits, window, sinks;
};

constexpr std::array<Preset, 5> kPresets = {{
    {"tq6", 6, 5, 32, 4},
    {"tq5", 5, 4, 32, 4},
    {"tq4", 4, 4, 32, 4},
    {"tq3", 3, 3, 128, 4},
    {"default", 4, 4, 32, 4},
}};

// Others are read by tq and the Python package.
constexpr std::array<std::string_view, 11> kKnown = {
    "TURBOQUANT_KV",        "TURBOQUANT_WINDOW",     "TURBOQUANT_SINKS",     "TURBOQUANT_SINK_SEQUENCES",
    "TURBOQUANT_HEAD_SIZE", "TURBOQUANT_ISA",        "TURBOQUANT_MODEL",     "TURBOQUANT_PLUGIN",
    "TURBOQUANT_PROFILE",   "TURBOQUANT_HOST_CHECK", "TURBOQUANT_CALIBRATE",
};

// A whole string of digits without sign.
bool parse_number(std::string_view text, int& value) {
    if (text.empty() || text.size() > 7 ||
        !std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; })) {
        return false;
    }
    value = std::atoi(std::string(text).c_str());
    return true;
}

bool parse_pair(std::string_view text, int& first, int& second) {
    const size_t slash = text.find('/');
    if (slash == std::string_view::npos) {
        if (!parse_number(text, first)) {
            return false;
        }
        second = first;
        return true;
    }
    return parse_number(text.substr(0, slash), first) && parse_number(text.substr(slash + 1), second);
}

bool is_bits(int bits) {
    return (bits >= 2 && bits <= 6) || bits == 8 || bits == 16;
}

Status parse_kv(std::string_view text, Config& config) {
    for (const Preset& preset : kPresets) {
        if (text == preset.name || (text.size() == 1 && text == preset.name.substr(2) && preset.name.size() == 3)) {
            config.key_bits = preset.key_bits;
            config.value_bits = preset.value_bits;
            config.window = preset.window;
            config.sinks = preset.sinks;
            return {};
        }
    }
    if (text == "auto") {
        config.profile_bits = true;
        return {};
    }
    if (text == "q4_0-emulated") { // not for use: fp16's memory
        config.emulate_q4_0 = true;
        config.key_bits = 16;
        config.value_bits = 16;
        return {};
    }
    int k = 0;
    int v = 0;
    if (text.find('/') != std::string_view::npos && parse_pair(text, k, v) && is_bits(k) && is_bits(v)) {
        config.key_bits = k;
        config.value_bits = v;
        return {};
    }
    return invalid(
        "TURBOQUANT_KV=" + std::string(text) +
        " is not understood: use a preset (tq3 tq4 tq5 tq6) or key/value bits such as 4/4 or 5/4 (2 3 4 5 6 8; "
        "16/16 stores fp16 unchanged), or auto for those that a profile has chosen for each layer");
}

Status parse_int(const char* name, int least, int most, int& value) {
    const char* text = std::getenv(name);
    if (text == nullptr) {
        return {};
    }
    int parsed = 0;
    if (!parse_number(text, parsed) || parsed < least || parsed > most) {
        return invalid(std::string(name) + "=" + text + " is not a whole number from " + std::to_string(least) +
                       " to " + std::to_string(most));
    }
    value = parsed;
    return {};
}

} // namespace

std::string Config::summary() const {
    auto side = [](int bits) { return bits == 16 ? std::string("fp16") : std::to_string(bits) + " bits"; };
    const std::string bits = profile_bits ? "keys and values as the profile says"
                                          : "keys " + side(key_bits) + ", values " + side(value_bits);
    return bits + ", window " + std::to_string(window) + ", sinks " + std::to_string(sinks);
}

Config Config::in_layer(const LayerProfile* layer) const {
    Config config = *this;
    if (profile_bits && layer != nullptr) {
        config.key_bits = layer->key_bits != 0 ? layer->key_bits : key_bits;
        config.value_bits = layer->value_bits != 0 ? layer->value_bits : value_bits;
    }
    return config;
}

Status load_profile(const Config& config, std::shared_ptr<const Profile>& profile) {
    struct Loaded {
        std::string path;
        std::filesystem::file_time_type time;
        uintmax_t size = 0;
        std::shared_ptr<const Profile> profile;
    };
    static std::mutex mutex;
    static Loaded last;
    profile.reset();
    if (config.profile.empty()) {
        return config.profile_bits ? invalid("TURBOQUANT_KV=auto takes the bits from a profile, and TURBOQUANT_PROFILE "
                                             "names none: set it to one made by `tq tune --budget`, or choose bits")
                                   : Status();
    }
    std::error_code time_error;
    std::error_code size_error;
    const auto time = std::filesystem::last_write_time(config.profile, time_error);
    const auto size = std::filesystem::file_size(config.profile, size_error);
    const std::lock_guard lock(mutex);
    if (time_error || size_error || last.profile == nullptr || last.path != config.profile || last.time != time ||
        last.size != size) {
        auto read = std::make_shared<Profile>();
        if (Status status = read_profile(config.profile, *read); !status.ok()) {
            return {status.code(), "TURBOQUANT_PROFILE: " + status.message()};
        }
        last = {config.profile, time, size, std::move(read)};
    }
    if (config.profile_bits && !last.profile->has_bits()) {
        return invalid("TURBOQUANT_KV=auto takes the bits from the profile '" + config.profile +
                       "', which has none: make it with `tq tune --budget`, or choose bits");
    }
    profile = last.profile;
    return {};
}

Status read_config(Config& config, std::string& unknown) {
    config = Config{};
    unknown.clear();
    for (char** entry = environ; *entry != nullptr; ++entry) {
        const std::string_view line = *entry;
        const std::string_view name = line.substr(0, line.find('='));
        if (name.substr(0, 11) == "TURBOQUANT_" && std::find(kKnown.begin(), kKnown.end(), name) == kKnown.end()) {
            unknown += (unknown.empty() ? "" : ", ") + std::string(name);
        }
    }
    if (const char* kv = std::getenv("TURBOQUANT_KV")) {
        if (Status status = parse_kv(kv, config); !status.ok()) {
            return status;
        }
    }
    for (const Status& status :
         {parse_int("TURBOQUANT_WINDOW", 0, 65536, config.window), parse_int("TURBOQUANT_SINKS", 0, 1024, config.sinks),
          parse_int("TURBOQUANT_SINK_SEQUENCES", 1, 4096, config.sequences)}) {
        if (!status.ok()) {
            return status;
        }
    }
    if (const char* path = std::getenv("TURBOQUANT_PROFILE")) {
        config.profile = path; // empty: as if unset
    }
    if (const char* text = std::getenv("TURBOQUANT_CALIBRATE")) {
        const std::string_view value = text;
        if (value != "on" && value != "off") {
            return invalid(std::string("TURBOQUANT_CALIBRATE=") + text + " is neither on nor off");
        }
        config.calibrate = value == "on";
    }
    if (const char* text = std::getenv("TURBOQUANT_HEAD_SIZE")) {
        if (!parse_pair(text, config.key_head_size, config.value_head_size) || config.key_head_size < 4 ||
            config.key_head_size > 1024 || config.value_head_size < 4 || config.value_head_size > 1024) {
            return invalid(std::string("TURBOQUANT_HEAD_SIZE=") + text +
                           " is not a head size from 4 to 1024, or two as key/value");
        }
    }
    return default_isa(config.isa);
}

} // namespace turboquant::plugin
