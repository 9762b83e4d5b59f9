// The plug-in's settings: TURBOQUANT_* environment variables, read when a context's KV cache is allocated, so that two
// contexts of one process can differ. docs/hosts.md lists them for users.
#pragma once

#include "turboquant/isa.h"
#include "turboquant/profile.h"
#include "turboquant/status.h"

#include <memory>
#include <string>

namespace turboquant::plugin {

struct Config {
    int key_bits = 4; // TURBOQUANT_KV: preset (tq3 tq4 tq5 tq6) or K/V bits; 16 is pass-through
    int value_bits = 4;
    int window = 32;   // TURBOQUANT_WINDOW: rows kept exact, the most recently written of each stream
    int sinks = 4;     // TURBOQUANT_SINKS: first rows of each sequence kept exact
    int sequences = 8; // TURBOQUANT_SINK_SEQUENCES: sequences of one stream whose first rows have room
    // TURBOQUANT_KV=auto: the bits are the profile's, layer by layer (in_layer); those above are for layers without any
    bool profile_bits = false;
    bool emulate_q4_0 = false; // TURBOQUANT_KV=q4_0-emulated: for comparisons (StoreOptions::emulate_q4_0)
    std::string profile;       // TURBOQUANT_PROFILE: path; empty: none
    bool calibrate = true;     // TURBOQUANT_CALIBRATE: on or off; without a profile, from the first rows
    int key_head_size = 0;     // TURBOQUANT_HEAD_SIZE: K or K/V; 0: learned from the graph
    int value_head_size = 0;
    Isa isa = Isa::portable; // TURBOQUANT_ISA, else the best

    std::string summary() const; // "keys 4 bits, values 4 bits, window 32, sinks 4"
    // With the bits of one layer; layer: its part of the profile or null.
    Config in_layer(const LayerProfile* layer) const;
};

// The profile that the settings name; null if they name none. Files are kept while they do not change, as a host asks
// for every tensor's size several times. Error: one line that names the file and the remedy; also when the settings want
// bits that it does not have. Thread-safe.
Status load_profile(const Config& config, std::shared_ptr<const Profile>& profile);

// Reads the environment. Error: names the variable, the value and what is accepted. `unknown` gets the names of
// TURBOQUANT_* variables that nothing here or in tq reads, comma-separated (a misspelt one must not pass in silence).
Status read_config(Config& config, std::string& unknown);

} // namespace turboquant::plugin
