// Codebooks and one vector in and out.
#include "turboquant/codec.h"

#include "codec/codec_tables.h"

#include <algorithm>
#include <bit>
#include <initializer_list>
#include <vector>

namespace turboquant {

namespace {

constexpr Codebook make_codebook(int bits, float unit, std::initializer_list<int> levels) {
    Codebook book;
    book.bits = bits;
    book.unit = unit;
    for (const int level : levels) {
        book.level[book.n_levels++] = static_cast<int8_t>(level);
    }
    return book;
}

// Integers near Lloyd-Max's centroids for N(0, 1) and the unit that makes them best; the mean squared error over
// Lloyd-Max's own in brackets (docs/format.md says how they were found).
constexpr Codebook kCodebooks[] = {
    make_codebook(2, 77.454F, {35, 117}),                                                       // +0.00 %
    make_codebook(3, 54.346F, {13, 41, 73, 117}),                                               // +0.03 %
    make_codebook(4, 39.149F, {5, 15, 25, 37, 49, 63, 81, 107}),                                // +0.34 %
    make_codebook(5, 36.240F, {2, 7, 12, 17, 22, 27, 32, 38, 44, 50, 57, 65, 74, 84, 97, 118}), // +0.67 %
    make_codebook(6, 28.822F, {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                               33, 36, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71, 77, 84, 93, 108}), // +2.04 %
    make_codebook(8, 0, {}),
};

// How far a block's grid follows its largest magnitude: fitted on normal vectors of 32 to 1024 elements to the least
// squared error (docs/format.md, "Grid"). Two bits gain nothing.
struct Stretch {
    float slope = 0;
    float origin = 0;
    float growth = 0;
};
constexpr Stretch kStretch[] = {{}, {}, {}, {.28F, 1.8F, .8F}, {.40F, 2.2F, .6F}, {.36F, 2.8F, .4F}, {.32F, 2.8F, .4F}};

// The thresholds as a tree (EncodeTable::tree).
void make_search(const Codebook& book, EncodeTable& table) {
    const int steps = book.bits - 1;
    // Of the comparisons so far; the first is the index's highest bit.
    const auto index_of = [steps](int path, int n) {
        int index = 0;
        for (int i = 0; i < n; ++i) {
            index |= (path >> i & 1) << (steps - 1 - i);
        }
        return index;
    };
    for (int step = 0; step < steps; ++step) {
        for (int lane = 0; lane < 16; ++lane) { // entries repeat, so that a vector of any width finds its own
            const int path = lane & ((1 << step) - 1);
            table.tree[step][lane] = table.threshold[index_of(path, step) + (1 << (steps - 1 - step)) - 1];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const int index = index_of(lane & ((1 << steps) - 1), steps);
        table.leaf_index[lane] = index;
        table.leaf_level[lane] = book.level[index];
    }
}

// Thresholds sorted into ranges as wide as `width` levels, the first half as wide (EncodeTable::range_threshold).
void make_ranges(const Codebook& book, float width, EncodeTable& table) {
    table.range_scale = book.unit / width;
    table.range_threshold[0] = -1;
    for (int k = 0; k < table.n_thresholds; ++k) {
        table.range_threshold[k + 1] = table.threshold[k];
    }
    for (int k = 0; k < book.n_levels; ++k) {
        table.level[k] = book.level[k];
    }
}

EncodeTable make_encode_table(const Codebook& book) {
    EncodeTable table;
    table.bits = book.bits;
    if (book.bits == 8) {
        return table;
    }
    table.n_thresholds = book.n_levels - 1;
    table.first_level = book.level[0];
    table.stretch_slope = kStretch[book.bits].slope;
    table.stretch_origin = kStretch[book.bits].origin;
    table.stretch_growth = kStretch[book.bits].growth;
    for (int k = 0; k < table.n_thresholds; ++k) {
        const int low = book.level[k];
        const int high = book.level[k + 1];
        table.threshold[k] = static_cast<float>(low + high) / (2.0F * book.unit);
        table.step[k] = (1 << 8) + high - low;
    }
    make_search(book, table);
    // Widths that put one threshold into each range; the search's tests would see another.
    if (book.bits == 3) {
        make_ranges(book, 30.0F, table);
    } else if (book.bits == 4) {
        make_ranges(book, 11.7F, table);
    }
    return table;
}

} // namespace

const Codebook* find_codebook(int bits) {
    const auto* const found = std::find_if(std::begin(kCodebooks), std::end(kCodebooks),
                                           [bits](const Codebook& b) { return b.bits == bits; });
    return found == std::end(kCodebooks) ? nullptr : found;
}

int8_t Codebook::value(int code) const {
    if (bits == 8) {
        return static_cast<int8_t>(code);
    }
    const int8_t magnitude = level[code & (n_levels - 1)];
    return static_cast<int8_t>((code & n_levels) != 0 ? -magnitude : magnitude);
}

const EncodeTable& encode_table(int bits) {
    static const std::vector<EncodeTable> tables = [] {
        std::vector<EncodeTable> all(9);
        for (const Codebook& book : kCodebooks) {
            all[static_cast<size_t>(book.bits)] = make_encode_table(book);
        }
        return all;
    }();
    return tables[static_cast<size_t>(bits)];
}

KernelRule kernel_rule(ScaleRule rule) {
    switch (rule) {
    case ScaleRule::unbiased: return KernelRule::unbiased;
    case ScaleRule::matched: return KernelRule::matched;
    case ScaleRule::mmse: break;
    }
    return KernelRule::mmse;
}

const CodecKernels& codec_kernels([[maybe_unused]] Isa isa) {
#if defined(TURBOQUANT_HAVE_AVX512)
    if (isa == Isa::avx512 || isa == Isa::avx512vbmi) {
        return kernels_avx512::kKernels;
    }
#endif
#if defined(TURBOQUANT_HAVE_AVX2)
    if (isa == Isa::avx2 || isa == Isa::avxvnni) {
        return kernels_avx2::kKernels;
    }
#endif
    return kernels_portable::kKernels; // neon: the baseline of AArch64
}

const CodecKernels& default_kernels() {
    static const CodecKernels& kernels = []() -> const CodecKernels& {
        Isa isa = Isa::portable;
        return default_isa(isa).ok() ? codec_kernels(isa) : codec_kernels(Isa::portable);
    }();
    return kernels;
}

EncodeNote encode_block(const float* y, int n, const Codebook& book, ScaleRule rule, uint8_t* codes, uint16_t* scale,
                        Isa isa) {
    const int padded = round_up(n, kVectorPadding);
    alignas(64) float values[kMaxHeadSize];
    alignas(64) uint8_t padded_codes[kMaxHeadSize];
    std::vector<float> large_values;
    std::vector<uint8_t> large_codes;
    float* v = values;
    uint8_t* c = padded_codes;
    if (padded > kMaxHeadSize) { // no head is that large; callers with vectors of their own may be
        large_values.resize(static_cast<size_t>(padded));
        large_codes.resize(static_cast<size_t>(padded));
        v = large_values.data();
        c = large_codes.data();
    }
    std::copy_n(y, n, v);
    std::fill(v + n, v + padded, 0.0F);
    const uint8_t note = codec_kernels(isa).encode(v, n, encode_table(book.bits), kernel_rule(rule), c, scale);
    std::copy_n(c, n, codes);
    return static_cast<EncodeNote>(note);
}

void decode_block(const uint8_t* codes, int n, const Codebook& book, uint16_t scale, float* y) {
    const float s = from_half(scale);
    for (int i = 0; i < n; ++i) {
        y[i] = s * static_cast<float>(book.value(codes[i]));
    }
}

uint16_t to_half(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffffU;
    const uint32_t sign = bits >> 16 & 0x8000U;
    uint32_t h = 0;
    if (magnitude > 0x7f800000U) {
        h = 0x7e00U | (magnitude >> 13 & 0x1ffU); // a quiet NaN keeps what fits of its payload
    } else if (magnitude >= 0x477ff000U) {        // 65520 and above: rounds to infinity
        h = 0x7c00U;
    } else if (magnitude < 0x38800000U) { // below 2^-14: adding 1/2 leaves multiples of 2^-24
        h = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3f000000U;
    } else {
        h = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
    }
    return static_cast<uint16_t>(sign | h);
}

float from_half(uint16_t h) {
    const uint32_t sign = (h & 0x8000U) << 16;
    const uint32_t magnitude = (h & 0x7fffU) << 13;
    if (magnitude >= 0x0f800000U) { // infinity, NaN
        return std::bit_cast<float>(sign | 0x7f800000U | (magnitude & 0x007fffffU));
    }
    if (magnitude < 0x00800000U) { // subnormal
        const float x = std::bit_cast<float>(magnitude + (113U << 23)) - std::bit_cast<float>(113U << 23);
        return std::bit_cast<float>(std::bit_cast<uint32_t>(x) | sign);
    }
    return std::bit_cast<float>(sign | (magnitude + (112U << 23)));
}

} // namespace turboquant
