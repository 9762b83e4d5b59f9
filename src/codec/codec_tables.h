// What the codec's parts share below the public header. Internal.
#pragma once

#include "codec/kernels.h"
#include "turboquant/codec.h"

namespace turboquant {

// Thresholds of a codebook for the kernels; find_codebook(bits) must not be null.
const EncodeTable& encode_table(int bits);

KernelRule kernel_rule(ScaleRule rule);

// The instruction set for calls that name none: default_isa(), or portable where that is an error (the callers with a
// Status report it). All give the same bits.
const CodecKernels& default_kernels();

// The sign of element `index` of a rotation block of `size`.
float rotation_sign(int size, int index);

// Largest servable block (2^k >= 4, 12*2^k, 20*2^k) of at most `limit` elements, limit >= 4.
int largest_block(int limit);

} // namespace turboquant
