// TurboQuant as the paper has it (arXiv 2504.19874), in double precision and without any shortcut: what the codec is
// measured against. Algorithm 1 (least squared error) and Algorithm 2 (unbiased inner products). Slow; not for caches.
#pragma once

#include "turboquant/status.h"

#include <cstdint>
#include <vector>

namespace turboquant {

// Lloyd-Max centroids of a standard normal, ascending, both signs: 2^bits of them. bits in 0..8; 0 gives {0}.
// S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982).
std::vector<double> lloyd_max_centroids(int bits);

// Mean squared error of a quantiser with these centroids (ascending) for a standard normal, in closed form.
double normal_mse(const std::vector<double>& centroids);

// Algorithm 1. x: any vector of `dimension`; its norm is kept aside in double precision.
class ReferenceMseCodec {
public:
    // dimension 1..4096, bits 0..8. The rotation is Haar-distributed, drawn from `seed`: the same on every machine.
    static Status create(int dimension, int bits, uint64_t seed, ReferenceMseCodec& out);

    int dimension() const { return dimension_; }
    // index: `dimension` entries.
    void encode(const double* x, uint8_t* index, double& norm) const;
    void decode(const uint8_t* index, double norm, double* x) const;

private:
    int dimension_ = 0;
    std::vector<double> centroids_;
    std::vector<double> rotation_; // row-major, orthonormal rows
};

// The projection of Algorithm 2: rows of independent normals as in the paper, or the same made orthogonal, which
// lowers the variance by pi/2 : pi/2 - 1 (docs/format.md).
enum class Projection { gaussian, orthogonal };

// Algorithm 2: bits - 1 bits of Algorithm 1 and one sign bit of a projection of the residual (QJL, arXiv 2406.03482).
class ReferenceProductCodec {
public:
    struct Encoded {
        std::vector<uint8_t> index;
        std::vector<int8_t> sign; // +1 or -1
        double norm = 0;
        double residual_norm = 0;
    };

    // bits 1..8. Rotation and projection are drawn from seeds of their own.
    static Status create(int dimension, int bits, Projection projection, uint64_t rotation_seed,
                         uint64_t projection_seed, ReferenceProductCodec& out);

    void encode(const double* x, Encoded& out) const;
    // <y, decode(encode(x))> is <y, x> on average over projections.
    void decode(const Encoded& in, double* x) const;

private:
    ReferenceMseCodec mse_;
    std::vector<double> projection_; // row-major
    double factor_ = 0;              // what S^T sign(S r) is multiplied by to give r on average, |r| = 1
};

} // namespace turboquant
