// The codec: rotation, codebooks, and one vector in and out. Pure functions, no threads, no state.
// Sources: TurboQuant (arXiv 2504.19874); the integer codebooks and scale rules are this project's (docs/format.md).
#pragma once

#include "turboquant/isa.h"
#include "turboquant/layout.h"
#include "turboquant/status.h"

#include <cstdint>
#include <vector>

namespace turboquant {

// ---- rotation ----------------------------------------------------------------------------------------------------
// y = R x: a fixed, sign-randomised orthonormal Hadamard transform. A head is split into blocks, each of a size that a
// Hadamard matrix of the form 2^k, 12*2^k or 20*2^k serves (64, 80 = 20*4, 96 = 12*8, 128, 256, ...); other sizes are
// a sum of such blocks, largest first (576 = 512 + 64). Within a block: y = H (sign * x) / sqrt(n).

struct RotationBlock {
    int offset = 0;
    int size = 0;
};

class Rotation {
public:
    // head_size: a multiple of 4 in 4..1024. Signs depend on the block's size and place only: the same on every
    // machine, part of the stored format.
    static Status create(int head_size, Rotation& out);

    int head_size() const { return head_size_; }
    const std::vector<RotationBlock>& blocks() const { return blocks_; }
    const std::vector<float>& signs() const { return signs_; } // head_size entries, +1 or -1

    // y = R x and x = R^T y; head_size floats each; in place allowed. Thread-safe. Bit-identical on every instruction
    // set (a fixed order of operations, no contraction).
    void forward(const float* x, float* y) const;
    void inverse(const float* y, float* x) const;

private:
    int head_size_ = 0;
    std::vector<RotationBlock> blocks_;
    std::vector<float> signs_;
};

// ---- codebook ----------------------------------------------------------------------------------------------------

struct Codebook {
    int bits = 0;
    int n_levels = 0;             // magnitudes: 2^(bits-1); 0 for 8 bits (linear)
    int8_t level[32] = {};        // ascending odd or small integers
    float unit = 0;               // level / unit is the centroid for a standard normal; 0 for 8 bits
    int8_t value(int code) const; // the signed integer a stored code means (layout.h)
};

// bits: 2, 3, 4, 5, 6, 8, else nullptr.
const Codebook* find_codebook(int bits);

// ---- one vector --------------------------------------------------------------------------------------------------

// unbiased: s = |y|^2/<y,c>, E<q,x~> = <q,x> (keys). matched: s = |y|/|c|, keeps the norm (values).
// mmse: s = <y,c>/|c|^2, least squared error.
enum class ScaleRule { unbiased, matched, mmse };

// What encoding one rotation block met. Neither poisons its neighbours.
enum class EncodeNote : uint8_t {
    none = 0,
    saturated = 1 /* scale above fp16: largest finite kept */,
    nonfinite = 2 /* NaN or infinity in the vector: stored as zero */
};

// Encodes one already rotated block: y[n] -> codes[n] (stored code values, layout.h) and one fp16 scale. A zero vector,
// or one whose scale is below the smallest fp16, gets scale 0 and decodes to zeros. Every norm is taken in fp32 after
// dividing by the largest magnitude, so huge inputs do not overflow. Same codes on every instruction set.
EncodeNote encode_block(const float* y, int n, const Codebook& book, ScaleRule rule, uint8_t* codes, uint16_t* scale,
                        Isa isa);
// y~[j] = scale * value(codes[j]).
void decode_block(const uint8_t* codes, int n, const Codebook& book, uint16_t scale, float* y);

// fp16 conversions, round to nearest even, finite values above the range become infinity as in IEEE.
uint16_t to_half(float x);
float from_half(uint16_t h);

} // namespace turboquant
