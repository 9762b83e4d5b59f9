#include "turboquant/reference_codec.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <string>

namespace turboquant {

namespace {

double density(double x) {
    return std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
}

double upper_tail(double x) {
    return 0.5 * std::erfc(x / std::numbers::sqrt2);
}

// Integrals of 1, x and x^2 times the normal density over [a, b].
struct Moments {
    double mass;
    double first;
    double second;
};

Moments moments(double a, double b) {
    const double at_a = std::isinf(a) ? 0 : a * density(a);
    const double at_b = std::isinf(b) ? 0 : b * density(b);
    // Tails on the side where they are small: no cancellation far out.
    const double mass = a >= 0 ? upper_tail(a) - upper_tail(b) : upper_tail(-b) - upper_tail(-a);
    return {mass, density(a) - density(b), mass + at_a - at_b};
}

double lower_edge(const std::vector<double>& c, size_t i) {
    return i == 0 ? -HUGE_VAL : (c[i - 1] + c[i]) / 2;
}

double upper_edge(const std::vector<double>& c, size_t i) {
    return i + 1 == c.size() ? HUGE_VAL : (c[i] + c[i + 1]) / 2;
}

// Standard normals by Box and Muller: std::normal_distribution differs between libraries.
std::vector<double> normals(size_t n, uint64_t seed) {
    std::mt19937_64 bits(seed);
    const auto uniform = [&bits] { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; };
    std::vector<double> out(n + 1);
    for (size_t i = 0; i < n; i += 2) {
        const double radius = std::sqrt(-2 * std::log(uniform()));
        const double angle = 2 * std::numbers::pi * uniform();
        out[i] = radius * std::cos(angle);
        out[i + 1] = radius * std::sin(angle);
    }
    out.resize(n);
    return out;
}

double dot(const double* a, const double* b, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

// Gram and Schmidt, twice over, on the rows of a Gaussian matrix: orthonormal and Haar-distributed.
std::vector<double> random_rotation(int n, uint64_t seed) {
    const auto size = static_cast<size_t>(n);
    std::vector<double> m = normals(size * size, seed);
    for (int i = 0; i < n; ++i) {
        double* const row = m.data() + static_cast<size_t>(i) * size;
        for (int pass = 0; pass < 2; ++pass) {
            for (int j = 0; j < i; ++j) {
                const double* const other = m.data() + static_cast<size_t>(j) * size;
                const double along = dot(row, other, n);
                for (int k = 0; k < n; ++k) {
                    row[k] -= along * other[k];
                }
            }
        }
        const double norm = std::sqrt(dot(row, row, n));
        std::transform(row, row + n, row, [norm](double v) { return v / norm; });
    }
    return m;
}

void multiply(const std::vector<double>& m, const double* x, int n, double* y) {
    for (int i = 0; i < n; ++i) {
        y[i] = dot(m.data() + static_cast<size_t>(i) * static_cast<size_t>(n), x, n);
    }
}

template <class T>
void multiply_transposed(const std::vector<double>& m, const T* y, int n, double factor, double* x) {
    std::fill(x, x + n, 0.0);
    for (int i = 0; i < n; ++i) {
        const double* const row = m.data() + static_cast<size_t>(i) * static_cast<size_t>(n);
        const double weight = factor * static_cast<double>(y[i]);
        for (int k = 0; k < n; ++k) {
            x[k] += weight * row[k];
        }
    }
}

// E |u_1| of a uniform point on the unit sphere of n dimensions.
double mean_coordinate(int n) {
    return std::exp(std::lgamma(0.5 * n) - std::lgamma(0.5 * (n + 1))) / std::sqrt(std::numbers::pi);
}

} // namespace

std::vector<double> lloyd_max_centroids(int bits) {
    const size_t n = size_t{1} << std::clamp(bits, 0, 8);
    std::vector<double> c(n);
    for (size_t i = 0; i < n; ++i) {
        c[i] = 3 * ((2 * static_cast<double>(i) + 1) / static_cast<double>(n) - 1);
    }
    for (int step = 0; step < 100000; ++step) {
        double moved = 0;
        std::vector<double> next(n);
        for (size_t i = 0; i < n; ++i) {
            const Moments m = moments(lower_edge(c, i), upper_edge(c, i));
            next[i] = m.first / m.mass;
            moved = std::max(moved, std::abs(next[i] - c[i]));
        }
        c = std::move(next);
        if (moved < 1e-12) {
            break;
        }
    }
    return c;
}

double normal_mse(const std::vector<double>& c) {
    double error = 0;
    for (size_t i = 0; i < c.size(); ++i) {
        const Moments m = moments(lower_edge(c, i), upper_edge(c, i));
        error += m.second - 2 * c[i] * m.first + c[i] * c[i] * m.mass;
    }
    return error;
}

Status ReferenceMseCodec::create(int dimension, int bits, uint64_t seed, ReferenceMseCodec& out) {
    if (dimension < 1 || dimension > 4096 || bits < 0 || bits > 8) {
        return invalid("reference codec: dimension " + std::to_string(dimension) + ", " + std::to_string(bits) +
                       " bits; use a dimension in 1..4096 and 0..8 bits");
    }
    out.dimension_ = dimension;
    out.centroids_ = lloyd_max_centroids(bits);
    out.rotation_ = random_rotation(dimension, seed);
    return {};
}

void ReferenceMseCodec::encode(const double* x, uint8_t* index, double& norm) const {
    norm = std::sqrt(dot(x, x, dimension_));
    std::vector<double> y(static_cast<size_t>(dimension_));
    multiply(rotation_, x, dimension_, y.data());
    const double to_normal = norm > 0 ? std::sqrt(static_cast<double>(dimension_)) / norm : 0;
    for (size_t j = 0; j < y.size(); ++j) {
        const double value = y[j] * to_normal;
        size_t best = 0;
        while (best + 1 < centroids_.size() && value > upper_edge(centroids_, best)) {
            ++best;
        }
        index[j] = static_cast<uint8_t>(best);
    }
}

void ReferenceMseCodec::decode(const uint8_t* index, double norm, double* x) const {
    std::vector<double> y(static_cast<size_t>(dimension_));
    std::transform(index, index + dimension_, y.begin(), [this](uint8_t i) { return centroids_[i]; });
    multiply_transposed(rotation_, y.data(), dimension_, norm / std::sqrt(static_cast<double>(dimension_)), x);
}

Status ReferenceProductCodec::create(int dimension, int bits, Projection projection, uint64_t rotation_seed,
                                     uint64_t projection_seed, ReferenceProductCodec& out) {
    if (bits < 1) {
        return invalid("reference product codec: " + std::to_string(bits) + " bits; use 1..8");
    }
    if (Status status = ReferenceMseCodec::create(dimension, bits - 1, rotation_seed, out.mse_); !status.ok()) {
        return status;
    }
    const auto size = static_cast<size_t>(dimension);
    if (projection == Projection::gaussian) {
        out.projection_ = normals(size * size, projection_seed);
        out.factor_ = std::sqrt(std::numbers::pi / 2) / dimension; // Algorithm 2, line 11
    } else {
        out.projection_ = random_rotation(dimension, projection_seed);
        out.factor_ = 1 / (dimension * mean_coordinate(dimension));
    }
    return {};
}

void ReferenceProductCodec::encode(const double* x, Encoded& out) const {
    const int n = mse_.dimension();
    const auto size = static_cast<size_t>(n);
    out.index.resize(size);
    out.sign.resize(size);
    mse_.encode(x, out.index.data(), out.norm);
    std::vector<double> residual(size);
    mse_.decode(out.index.data(), out.norm, residual.data());
    std::transform(x, x + n, residual.begin(), residual.begin(), [](double a, double b) { return a - b; });
    out.residual_norm = std::sqrt(dot(residual.data(), residual.data(), n));
    std::vector<double> projected(size);
    multiply(projection_, residual.data(), n, projected.data());
    std::transform(projected.begin(), projected.end(), out.sign.begin(),
                   [](double v) { return static_cast<int8_t>(v < 0 ? -1 : 1); });
}

void ReferenceProductCodec::decode(const Encoded& in, double* x) const {
    const int n = mse_.dimension();
    std::vector<double> correction(static_cast<size_t>(n));
    multiply_transposed(projection_, in.sign.data(), n, factor_ * in.residual_norm, correction.data());
    mse_.decode(in.index.data(), in.norm, x);
    std::transform(x, x + n, correction.begin(), x, [](double a, double b) { return a + b; });
}

} // namespace turboquant
