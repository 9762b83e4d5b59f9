// Little-endian integers, a checksum and a hash, for records, profiles and saved rows.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace turboquant {

inline void append(std::vector<uint8_t>& out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) {
        out.push_back(static_cast<uint8_t>(value >> (8 * i)));
    }
}

inline void put_at(uint8_t* out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) {
        out[i] = static_cast<uint8_t>(value >> (8 * i));
    }
}

inline uint64_t get_at(const uint8_t* in, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) {
        value |= static_cast<uint64_t>(in[i]) << (8 * i);
    }
    return value;
}

// CRC-32 (IEEE 802.3, reflected), continuing from `crc`; start with 0. Finds every change within 32 adjacent bits.
inline uint32_t crc32(uint32_t crc, const uint8_t* in, size_t n) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> t{};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) {
                c = (c >> 1) ^ ((c & 1U) != 0 ? 0xedb88320U : 0U);
            }
            t[i] = c;
        }
        return t;
    }();
    crc = ~crc;
    for (size_t i = 0; i < n; ++i) {
        crc = table[(crc ^ in[i]) & 0xffU] ^ (crc >> 8);
    }
    return ~crc;
}

// FNV-1a over 64 bits with SplitMix64's finaliser, which brings every input bit to every output bit.
inline uint64_t hash_bytes(const uint8_t* in, size_t n) {
    uint64_t h = 0xcbf29ce484222325U;
    for (size_t i = 0; i < n; ++i) {
        h = (h ^ in[i]) * 0x100000001b3U;
    }
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9U;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebU;
    return h ^ (h >> 31);
}

} // namespace turboquant
