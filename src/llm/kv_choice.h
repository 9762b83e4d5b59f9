// Which KV cache the user wants: the grammar of --kv and what the other cache flags change about it.
//
//   preset       tq6 tq5 tq4 tq3 or plainly 6 5 4 3, `default` (tq4)
//   K/V          bits for keys and values, 2 3 4 5 6 8 each; 16 is pass-through (fp16 rows in the plug-in, no codec)
//   auto         bits of each layer's keys and values as the model's profile has them (tq tune --budget)
//   q4_0-emulated  llama.cpp's q4_0 format with our conditioning and exact rows: for comparisons, in fp16's memory
//   host type    f16 q8_0 q5_1 q5_0 q4_0: llama.cpp's own cache, without the plug-in
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant::llm {

struct LayerBits {
    int key = 0;
    int value = 0;
};

struct KvChoice {
    std::string name;      // as the user would write it
    std::string host_type; // not empty: llama.cpp's own cache of this type; the rest is unused
    int key_bits = 4;
    int value_bits = 4;
    int window = 32; // most recently written rows kept exact
    int sinks = 4;   // first positions kept exact
    // Path of the profile that the plug-in conditions keys with; empty: from the cache's own first rows. Whoever makes a
    // session sets it (profile_cache.h).
    std::string profile;
    // Given: no profile; keys are conditioned from the first rows, or not at all. Absent: as profile and environment say.
    std::optional<bool> calibrate;
    bool emulate_q4_0 = false; // `q4_0-emulated`: llama.cpp's format within our conditioning, for comparisons
    bool automatic = false; // `auto`: layer_bits, once the profile has been read, in place of key_bits and value_bits
    std::map<int, LayerBits> layer_bits;
    double mean_bits = 0; // a value, of layer_bits

    bool turboquant() const { return host_type.empty(); }
    bool pass_through() const {
        return turboquant() && !automatic && !emulate_q4_0 && key_bits == 16 && value_bits == 16;
    }
    // Latest rows that are exact while earlier ones are codes; 0: no row is, or all are.
    int exact_rows() const { return turboquant() && !pass_through() ? window : 0; }
    LayerBits bits_of(int layer) const;
    // What goes into TURBOQUANT_KV: "4/4", "auto".
    std::string bits() const;
    // Name with window and sinks where they matter: "tq4 (4/4 bits, window 32, sinks 4)".
    std::string describe() const;
};

// What the flags (or the environment) said; absent: not given.
struct KvFlags {
    std::optional<std::string> kv;
    std::optional<int> key_bits;
    std::optional<int> value_bits;
    std::optional<int> window;
    std::optional<int> sinks;
    bool no_turboquant = false;
};

// Throws UsageError that names the accepted words.
KvChoice parse_kv(std::string_view text);
KvChoice resolve_kv(const KvFlags& flags);

// f16, q8_0 and the presets from most to fewest bits: the rows of the memory plan.
const std::vector<std::string>& kv_overview();

} // namespace turboquant::llm
