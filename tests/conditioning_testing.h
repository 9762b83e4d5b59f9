// Keys, queries and conditionings for the tests of src/conditioning.
#pragma once

#include "turboquant/conditioning.h"

#include <cmath>
#include <complex>
#include <cstdint>
#include <random>
#include <vector>

namespace turboquant::testing {

using Complex = std::complex<double>;

// Pairs (2i, 2i+1) or (i, i+n/2) of the first n_rotated channels, theta = base^(-2i/n_rotated).
inline std::vector<RopePair> make_rope(int n_rotated, double base, bool neighbours) {
    std::vector<RopePair> rope;
    const int half = n_rotated / 2;
    for (int i = 0; i < half; ++i) {
        const int first = neighbours ? 2 * i : i;
        const int second = neighbours ? 2 * i + 1 : i + half;
        rope.push_back({static_cast<uint16_t>(first), static_cast<uint16_t>(second),
                        static_cast<float>(std::pow(base, -2.0 * i / n_rotated))});
    }
    return rope;
}

// Turns every pair of every head by theta * position, as a model does before it stores a key.
inline void turn(std::vector<float>& row, int head_size, const std::vector<RopePair>& rope, int64_t position) {
    for (size_t head = 0; head < row.size(); head += static_cast<size_t>(head_size)) {
        for (const RopePair& pair : rope) {
            const Complex turned = Complex(row[head + pair.first], row[head + pair.second]) *
                                   std::polar(1.0, static_cast<double>(pair.theta) * static_cast<double>(position));
            row[head + pair.first] = static_cast<float>(turned.real());
            row[head + pair.second] = static_cast<float>(turned.imag());
        }
    }
}

// Noise of the given deviation per channel about a mean per channel.
inline std::vector<float> draw(std::mt19937& random, const std::vector<float>& mean,
                               const std::vector<float>& deviation) {
    std::normal_distribution<float> normal;
    std::vector<float> row(mean.size());
    for (size_t i = 0; i < row.size(); ++i) {
        row[i] = mean[i] + deviation[i] * normal(random);
    }
    return row;
}

inline std::vector<float> uniform(std::mt19937& random, size_t n, float low, float high) {
    std::uniform_real_distribution<float> between(low, high);
    std::vector<float> values(n);
    for (float& v : values) {
        v = between(random);
    }
    return values;
}

inline Conditioning random_conditioning(std::mt19937& random, int head_size, int kv_heads) {
    const auto n = static_cast<size_t>(head_size) * static_cast<size_t>(kv_heads);
    Conditioning c;
    c.mu = uniform(random, n, -3, 3);
    c.lambda = uniform(random, n, .25F, 4);
    c.rope = make_rope(head_size / 2, 10000, false);
    return storable(c);
}

inline bool equal(const Conditioning& a, const Conditioning& b) {
    bool same = a.mu == b.mu && a.lambda == b.lambda && a.rope.size() == b.rope.size();
    for (size_t i = 0; same && i < a.rope.size(); ++i) {
        same = a.rope[i].first == b.rope[i].first && a.rope[i].second == b.rope[i].second &&
               a.rope[i].theta == b.rope[i].theta;
    }
    return same;
}

} // namespace turboquant::testing
