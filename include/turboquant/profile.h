// A model's profile: for each layer the conditioning of its keys and, where a search has chosen them, its bits.
// A small file (docs/format.md has the bytes): magic, version, note, layers, checksum.
#pragma once

#include "turboquant/conditioning.h"
#include "turboquant/status.h"

#include <string>
#include <vector>

namespace turboquant {

struct LayerProfile {
    int layer = 0; // N of the host's cache_k_l<N>
    int head_size = 0;
    int kv_heads = 0;
    Conditioning keys; // storable()
    int key_bits = 0;  // 0: whatever the setting says
    int value_bits = 0;
};

struct Profile {
    std::string model;                         // for people: what it was made from
    std::string text;                          // for people: text and number of tokens
    double bits = 0;                           // mean bits a value that the per-layer bits come to; 0: none chosen
    std::vector<LayerProfile> layers;          // ascending
    const LayerProfile* find(int layer) const; // null: none
    bool has_bits() const { return bits > 0; }
};

// Errors are one line that names the path, what is wrong and what to do (make it anew with `tq tune`). write_profile
// replaces the file in one step: no reader ever sees half of it.
Status read_profile(const std::string& path, Profile& out);
Status write_profile(const std::string& path, const Profile& profile);
// The same from and to bytes.
Status parse_profile(const std::vector<uint8_t>& bytes, Profile& out);
std::vector<uint8_t> serialise_profile(const Profile& profile);

} // namespace turboquant
