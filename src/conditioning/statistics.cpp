// Sums over keys and queries and the conditioning that follows from them. Formulas: docs/quality.md, "Statistics".
#include "turboquant/conditioning.h"

#include "conditioning/pair_mean.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <utility>

namespace turboquant {

namespace {

constexpr size_t kMaxRemembered = 1024;
constexpr double kMeanPrior = 2;       // rows at zero that c is averaged with: two more than none
constexpr double kLeastVariance = .02; // of the second moment: a mean from few rows must not explain everything
constexpr double kShare = .01;         // of the head's mean that every channel gets: some channels are always zero

// s and v of one head to its factors: (s/v)^(1/4), geometric mean 1.
void head_factors(std::vector<double>& s, std::vector<double>& v, float* lambda) {
    const size_t n = s.size();
    double s_mean = 0;
    double v_mean = 0;
    for (size_t i = 0; i < n; ++i) {
        s_mean += s[i] / static_cast<double>(n);
        v_mean += v[i] / static_cast<double>(n);
    }
    std::fill_n(lambda, n, 1.0F);
    if (!(s_mean > 0) || !(v_mean > 0)) {
        return; // no queries or only zero keys here: nothing to choose by
    }
    double log_sum = 0;
    for (size_t i = 0; i < n; ++i) {
        s[i] = std::log((s[i] + kShare * s_mean) / (v[i] + kShare * v_mean)) / 4;
        log_sum += s[i];
    }
    for (size_t i = 0; i < n; ++i) {
        lambda[i] = static_cast<float>(std::exp(s[i] - log_sum / static_cast<double>(n)));
    }
}

// |a - b|^2. In single precision by lanes: a row is compared with every earlier one while a cache calibrates.
double squared_distance(const float* a, const float* b, size_t n) {
    constexpr size_t kLanes = 16;
    float lanes[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (size_t l = 0; l < kLanes; ++l) {
            const float d = a[i + l] - b[i + l];
            lanes[l] += d * d;
        }
    }
    for (; i < n; ++i) {
        const float d = a[i] - b[i];
        lanes[i % kLanes] += d * d;
    }
    double sum = 0;
    for (const float lane : lanes) {
        sum += static_cast<double>(lane);
    }
    return sum;
}

// Some channels of a row, spread over its heads. The distance of two sketches is at most that of the rows.
constexpr size_t kSketch = 32;
void make_sketch(const std::vector<float>& row, float* out) {
    for (size_t i = 0; i < kSketch; ++i) {
        out[i] = row.size() >= kSketch ? row[i * row.size() / kSketch] : 0;
    }
}

bool same_rope(const std::vector<RopePair>& a, const std::vector<RopePair>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const RopePair& x, const RopePair& y) {
        return x.first == y.first && x.second == y.second && std::abs(x.theta - y.theta) <= 1e-5F * std::abs(x.theta);
    });
}

} // namespace

KeyStatistics::KeyStatistics(int head_size, int kv_heads, std::vector<RopePair> rope)
    : head_size_(head_size), kv_heads_(kv_heads), rope_(std::move(rope)) {
    const size_t n = static_cast<size_t>(head_size) * static_cast<size_t>(kv_heads);
    key_sum_.resize(n);
    block_sum_.resize(n);
    key_squares_.resize(n);
    query_squares_.resize(n);
    scratch_.resize(n);
}

void KeyStatistics::turn_back(const float* key, int64_t position, Turn& turn, float* out) const {
    const size_t n = key_sum_.size();
    if (turn.position != position) {
        turn.cosine.resize(rope_.size());
        turn.sine.resize(rope_.size());
        for (size_t i = 0; i < rope_.size(); ++i) {
            const double angle = static_cast<double>(rope_[i].theta) * static_cast<double>(position);
            turn.cosine[i] = std::cos(angle);
            turn.sine[i] = std::sin(angle);
        }
        turn.position = position;
    }
    std::copy_n(key, n, out);
    for (float* head = out; head < out + n; head += head_size_) {
        for (size_t i = 0; i < rope_.size(); ++i) {
            const double re = head[rope_[i].first];
            const double im = head[rope_[i].second];
            head[rope_[i].first] = static_cast<float>(re * turn.cosine[i] + im * turn.sine[i]);
            head[rope_[i].second] = static_cast<float>(im * turn.cosine[i] - re * turn.sine[i]);
        }
    }
}

void KeyStatistics::add_key(const float* key, int64_t position) {
    const size_t n = key_sum_.size();
    turn_back(key, position, row_turn_, scratch_.data());
    for (size_t i = 0; i < n; ++i) {
        key_sum_[i] += static_cast<double>(scratch_[i]);
        key_squares_[i] += static_cast<double>(key[i]) * static_cast<double>(key[i]);
    }
    turn_back(key, static_cast<int64_t>(position_block(position)) * kPositionBlock, block_turn_, scratch_.data());
    for (size_t i = 0; i < n; ++i) {
        block_sum_[i] += static_cast<double>(scratch_[i]);
    }
    ++n_keys_;
}

void KeyStatistics::add_query(const float* query, int kv_head) {
    double* const squares = query_squares_.data() + static_cast<size_t>(kv_head) * static_cast<size_t>(head_size_);
    for (int i = 0; i < head_size_; ++i) {
        squares[i] += static_cast<double>(query[i]) * static_cast<double>(query[i]);
    }
    ++n_queries_;
}

bool KeyStatistics::repeats(const float* key, int64_t position, int times, double distance) {
    const size_t n = key_sum_.size();
    turn_back(key, position, row_turn_, scratch_.data());
    float sketch[kSketch];
    make_sketch(scratch_, sketch);
    const size_t n_rows = remembered_.size() / n;
    int found = 0;
    for (size_t row = 0; row < n_rows && found < times; ++row) {
        if (squared_distance(sketch, sketches_.data() + row * kSketch, kSketch) <= distance &&
            squared_distance(scratch_.data(), remembered_.data() + row * n, n) <= distance) {
            ++found;
        }
    }
    if (found >= times) {
        return true;
    }
    if (n_rows < kMaxRemembered) {
        remembered_.insert(remembered_.end(), scratch_.begin(), scratch_.end());
        sketches_.insert(sketches_.end(), sketch, sketch + kSketch);
    }
    return false;
}

Conditioning KeyStatistics::conditioning() const {
    Conditioning out;
    if (n_keys_ == 0 || n_queries_ == 0) {
        return out;
    }
    const size_t n = key_sum_.size();
    const auto channels = static_cast<size_t>(head_size_);
    const auto keys = static_cast<double>(n_keys_);
    out.rope = rope_;
    out.mu.resize(n);
    out.lambda.resize(n);
    std::vector<double> s(channels);
    std::vector<double> v(channels);
    for (size_t head = 0; head < n; head += channels) {
        for (size_t i = 0; i < channels; ++i) {
            const double mean = key_sum_[head + i] / (keys + kMeanPrior);
            const double square = key_squares_[head + i] / keys;
            out.mu[head + i] = static_cast<float>(mean);
            v[i] = std::max(square - mean * mean, kLeastVariance * square);
            s[i] = query_squares_[head + i]; // only ratios count: not divided by the number of queries
        }
        for (const RopePair& pair : rope_) {
            const size_t a = pair.first;
            const size_t b = pair.second;
            const double square = (key_squares_[head + a] + key_squares_[head + b]) / keys;
            const std::complex<double> c(out.mu[head + a], out.mu[head + b]);
            const double taken = std::norm(c * block_average(pair.theta)); // the same in every block
            v[a] = v[b] = std::max(square - taken, kLeastVariance * square) / 2;
            s[a] = s[b] = (s[a] + s[b]) / 2;
        }
        head_factors(s, v, out.lambda.data() + head);
    }
    return storable(out);
}

double KeyStatistics::residual(const Conditioning& conditioning) const {
    if (n_keys_ == 0 || conditioning.mu.empty()) {
        return 1;
    }
    if (conditioning.mu.size() != key_sum_.size() || !same_rope(conditioning.rope, rope_)) {
        return std::numeric_limits<double>::infinity();
    }
    // block_sum_ is turned back to the start of each row's block, where every block's mean is that of block 0:
    // sum |z - mu|^2 = sum |z|^2 - 2 Re(conj(mu) sum z) + n |mu|^2.
    const size_t n = key_sum_.size();
    std::vector<float> mean(n);
    block_mean(conditioning, head_size_, kv_heads_, 0, mean.data());
    double energy = 0;
    double change = 0;
    for (size_t i = 0; i < n; ++i) {
        const double m = mean[i];
        energy += key_squares_[i];
        change += m * (static_cast<double>(n_keys_) * m - 2 * block_sum_[i]);
    }
    return energy > 0 ? (energy + change) / energy : 1;
}

} // namespace turboquant
