#include "llm/kv_choice.h"

#include "llm/error.h"

#include <algorithm>
#include <array>
#include <charconv>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

struct Preset {
    const char* name;
    int key_bits;
    int value_bits;
    int window;
    int sinks;
};

constexpr std::array<Preset, 4> kPresets = {{
    {"tq6", 6, 5, 32, 4},
    {"tq5", 5, 4, 32, 4},
    {"tq4", 4, 4, 32, 4},
    {"tq3", 3, 3, 128, 4},
}};
constexpr const char* kDefaultPreset = "tq4";
constexpr const char* kAutomatic = "auto";
constexpr const char* kEmulated = "q4_0-emulated";
constexpr std::array<const char*, 5> kHostTypes = {"f16", "q8_0", "q5_1", "q5_0", "q4_0"};
constexpr std::array<int, 7> kBits = {2, 3, 4, 5, 6, 8, 16};
constexpr int kMaxExactRows = 1 << 20;

bool known_bits(int bits) {
    return std::find(kBits.begin(), kBits.end(), bits) != kBits.end();
}

std::optional<int> to_int(std::string_view text) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || text.empty()) {
        return std::nullopt;
    }
    return value;
}

const Preset* find_preset(std::string_view name) {
    const std::string_view wanted = name == "default" ? std::string_view(kDefaultPreset) : name;
    for (const Preset& preset : kPresets) {
        if (wanted == preset.name || wanted == std::string_view(preset.name).substr(2)) { // "tq4" or "4"
            return &preset;
        }
    }
    return nullptr;
}

void check_bits(const char* flag, int bits) {
    if (!known_bits(bits) || bits == 16) {
        throw UsageError(fmt::format("{} {}: use 2, 3, 4, 5, 6 or 8 bits", flag, bits));
    }
}

void check_rows(const char* flag, int rows) {
    if (rows < 0 || rows > kMaxExactRows) {
        throw UsageError(fmt::format("{} {}: use a number of rows from 0 to {}", flag, rows, kMaxExactRows));
    }
}

} // namespace

LayerBits KvChoice::bits_of(int layer) const {
    const auto found = layer_bits.find(layer);
    return automatic && found != layer_bits.end() ? found->second : LayerBits{key_bits, value_bits};
}

std::string KvChoice::bits() const {
    return automatic ? kAutomatic : emulate_q4_0 ? kEmulated : fmt::format("{}/{}", key_bits, value_bits);
}

std::string KvChoice::describe() const {
    if (!turboquant()) {
        return host_type;
    }
    const std::string exact = fmt::format("window {}, sinks {}", window, sinks);
    if (automatic && mean_bits > 0) {
        return fmt::format("{} ({:.2f} bits, {})", name, mean_bits, exact);
    }
    return name == bits() ? fmt::format("{} ({})", name, exact) : fmt::format("{} ({} bits, {})", name, bits(), exact);
}

KvChoice parse_kv(std::string_view text) {
    KvChoice choice;
    choice.name = std::string(text);
    if (const Preset* preset = find_preset(text)) {
        choice.name = preset->name;
        choice.key_bits = preset->key_bits;
        choice.value_bits = preset->value_bits;
        choice.window = preset->window;
        choice.sinks = preset->sinks;
        return choice;
    }
    if (std::find(kHostTypes.begin(), kHostTypes.end(), text) != kHostTypes.end()) {
        choice.host_type = choice.name;
        return choice;
    }
    if (text == kAutomatic) {
        choice.automatic = true;
        return choice;
    }
    if (text == kEmulated) {
        choice.emulate_q4_0 = true;
        choice.key_bits = 16;
        choice.value_bits = 16;
        return choice;
    }
    if (const size_t slash = text.find('/'); slash != std::string_view::npos) {
        const std::optional<int> k = to_int(text.substr(0, slash));
        const std::optional<int> v = to_int(text.substr(slash + 1));
        if (k && v && known_bits(*k) && known_bits(*v)) {
            choice.key_bits = *k;
            choice.value_bits = *v;
            return choice;
        }
        throw UsageError(fmt::format("--kv {}: key/value bits are 2, 3, 4, 5, 6 or 8 each, as in 4/4 or 5/4", text));
    }
    throw UsageError(
        fmt::format("--kv {}: unknown; use a preset (tq6 tq5 tq4 tq3), bits K/V (4/4, 5/4), auto or a host "
                    "type (f16 q8_0 q5_1 q5_0 q4_0)",
                    text.empty() ? "''" : text));
}

KvChoice resolve_kv(const KvFlags& flags) {
    const bool bits_given = flags.key_bits || flags.value_bits;
    if (flags.no_turboquant) {
        if (bits_given || flags.window || flags.sinks) {
            throw UsageError("--no-turboquant: cannot be combined with --key-bits, --value-bits, --window or --sinks; "
                             "leave one side out");
        }
        if (flags.kv && parse_kv(*flags.kv).turboquant()) {
            throw UsageError(fmt::format("--no-turboquant: contradicts --kv {}; leave one of them out", *flags.kv));
        }
        return parse_kv(flags.kv.value_or("f16"));
    }
    KvChoice choice = parse_kv(flags.kv.value_or("default"));
    if (!choice.turboquant()) {
        if (bits_given || flags.window || flags.sinks) {
            throw UsageError(fmt::format("--kv {}: a host type has no --key-bits, --value-bits, --window or --sinks; "
                                         "leave them out or choose a preset such as tq4",
                                         choice.host_type));
        }
        return choice;
    }
    if (choice.emulate_q4_0 && bits_given) {
        throw UsageError("--kv q4_0-emulated: the format has its bits; leave out --key-bits and --value-bits");
    }
    if (choice.automatic && bits_given) {
        throw UsageError("--kv auto: the profile has each layer's bits; leave out --key-bits and --value-bits");
    }
    if (flags.key_bits) {
        check_bits("--key-bits", *flags.key_bits);
        choice.key_bits = *flags.key_bits;
    }
    if (flags.value_bits) {
        check_bits("--value-bits", *flags.value_bits);
        choice.value_bits = *flags.value_bits;
    }
    if (bits_given) {
        choice.name = choice.bits();
    }
    if (flags.window) {
        check_rows("--window", *flags.window);
        choice.window = *flags.window;
    }
    if (flags.sinks) {
        check_rows("--sinks", *flags.sinks);
        choice.sinks = *flags.sinks;
    }
    return choice;
}

const std::vector<std::string>& kv_overview() {
    static const std::vector<std::string> names = {"f16", "q8_0", "tq6", "tq5", "tq4", "tq3"};
    return names;
}

} // namespace turboquant::llm
