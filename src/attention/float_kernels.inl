// The float-tile kernels, one source for every instruction set: vectors are the compiler's own (GCC and Clang vector
// extensions), as wide as the including file's instruction set has them. Included once per instruction set, inside
// an anonymous namespace, so that no code compiled for one processor is shared with another.

#if defined(__AVX512F__)
constexpr int kWidth = 16; // floats a vector
constexpr int kBlockVectors = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kBlockVectors = 2;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kBlockVectors = 4; // 32 registers
#else
constexpr int kWidth = 4;
constexpr int kBlockVectors = 2;
#endif
constexpr int kBlockRows = 6;

typedef float Vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t Vi __attribute__((vector_size(kWidth * 4)));

inline Vf load(const float* p) {
    Vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vf v) {
    __builtin_memcpy(p, &v, sizeof v);
}
inline Vf splat(float x) {
    return Vf{} + x;
}
inline Vf vmax(Vf a, Vf b) { // b where one is NaN; GCC does not find the instruction
#if defined(__AVX512F__)
    return reinterpret_cast<Vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}
#if defined(__AVX2__) || defined(__AVX512F__)
inline __m256 low_half(Vf v) {
#if defined(__AVX512F__)
    return _mm512_castps512_ps256(reinterpret_cast<__m512>(v));
#else
    return reinterpret_cast<__m256>(v);
#endif
}
inline float lane_sum(Vf v) {
    __m256 a = low_half(v);
#if defined(__AVX512F__)
    a = _mm256_add_ps(a, _mm512_extractf32x8_ps(reinterpret_cast<__m512>(v), 1));
#endif
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float lane_max(Vf v) {
    __m256 a = low_half(v);
#if defined(__AVX512F__)
    a = _mm256_max_ps(a, _mm512_extractf32x8_ps(reinterpret_cast<__m512>(v), 1));
#endif
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#else
inline float lane_sum(Vf v) {
    return (v[0] + v[1]) + (v[2] + v[3]);
}
inline float lane_max(Vf v) {
    const float a = v[0] > v[1] ? v[0] : v[1];
    const float b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}
#endif

// 2^x for x <= 120; below -126 almost or quite 0. x = n + f; 2^f by a polynomial of relative error 8e-8 (least maximum,
// found by reweighted least squares).
#if defined(__AVX512DQ__)
inline Vf exp2_vector(Vf x) { // 0 <= f < 1: vscalefps takes the rest of x as it is
    const Vf f = reinterpret_cast<Vf>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF));
    Vf r = splat(1.877575951e-3f);
    r = r * f + splat(8.989341843e-3f);
    r = r * f + splat(5.582631658e-2f);
    r = r * f + splat(2.401536175e-1f);
    r = r * f + splat(6.931530731e-1f);
    r = r * f + splat(9.999999251e-1f);
    return reinterpret_cast<Vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(r), reinterpret_cast<__m512>(x)));
}
#else
inline Vf exp2_vector(Vf x) {            // |f| <= 1/2
    const Vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const Vf y = vmax(x, splat(-127.0f));
    const Vf shifted = y + magic;
    const Vf f = y - (shifted - magic);
    Vf r = splat(1.327646687e-3f);
    r = r * f + splat(9.675541294e-3f);
    r = r * f + splat(5.550713289e-2f);
    r = r * f + splat(2.402211972e-1f);
    r = r * f + splat(6.931469671e-1f);
    r = r * f + splat(1.000000072f);
    typedef uint32_t Vu __attribute__((vector_size(kWidth * 4)));
    const Vu bits = reinterpret_cast<Vu>(r) + (reinterpret_cast<Vu>(shifted) << 23);
    return x < splat(-126.0f) ? Vf{} : reinterpret_cast<Vf>(bits);
}
#endif

inline Vf tanh_vector(Vf x) {
    const Vf limit = splat(12.0f);
    Vf y = x > limit ? limit : x;
    y = y < -limit ? -limit : y;
    const Vf e = exp2_vector(y * splat(2.885390081777927f)); // e^(2y)
    return (e - 1.0f) / (e + 1.0f);
}

void unpack_key(const TileLayout& tile, const uint8_t* codes, uint8_t* bytes) {
    for (int p = 0; p < tile.n_planes; ++p) {
        const Plane& plane = tile.planes[p];
        const int width = plane.width;
        const int fields = 8 / width;
        const int groups = plane.padded_channels / (4 * fields);
        const uint32_t field_mask = (1u << width) - 1u;
        const uint8_t* line = codes + plane.offset;
        for (int half = 0; half < 2; ++half) {
            for (int group = 0; group < groups; ++group) {
                for (int j = 0; j < 2; ++j, line += kLineBytes) {
                    uint32_t lanes[16];
                    __builtin_memcpy(lanes, line, sizeof lanes);
                    for (int field = 0; field < fields; ++field) {
                        for (int b = 0; b < 4; ++b) {
                            const int channel = 4 * fields * group + 4 * field + b;
                            if (channel >= tile.head_size) {
                                break;
                            }
                            uint8_t* out = bytes + channel * kTileRows + half * 32 + j * 16;
                            const int shift = b * 8 + field * width;
                            if (p == 0) {
                                for (int l = 0; l < 16; ++l) {
                                    out[l] = static_cast<uint8_t>((lanes[l] >> shift) & field_mask);
                                }
                            } else {
                                for (int l = 0; l < 16; ++l) {
                                    out[l] = static_cast<uint8_t>(out[l] | ((lanes[l] >> shift) & field_mask)
                                                                               << plane.shift);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

void unpack_value(const TileLayout& tile, const uint8_t* codes, uint8_t* bytes, int ld) {
    for (int p = 0; p < tile.n_planes; ++p) {
        const Plane& plane = tile.planes[p];
        const int width = plane.width;
        const int fields = 8 / width;
        const int row_groups = kTileRows / (4 * fields);
        const uint32_t field_mask = (1u << width) - 1u;
        const uint8_t* line = codes + plane.offset;
        for (int h = 0; h < plane.padded_channels / 16; ++h) {
            for (int group = 0; group < row_groups; ++group, line += kLineBytes) {
                uint32_t lanes[16];
                __builtin_memcpy(lanes, line, sizeof lanes);
                for (int field = 0; field < fields; ++field) {
                    for (int b = 0; b < 4; ++b) {
                        uint8_t* out = bytes + (4 * fields * group + 4 * field + b) * ld + h * 16;
                        const int shift = b * 8 + field * width;
                        if (p == 0) {
                            for (int l = 0; l < 16; ++l) {
                                out[l] = static_cast<uint8_t>((lanes[l] >> shift) & field_mask);
                            }
                        } else {
                            for (int l = 0; l < 16; ++l) {
                                out[l] =
                                    static_cast<uint8_t>(out[l] | ((lanes[l] >> shift) & field_mask) << plane.shift);
                            }
                        }
                    }
                }
            }
        }
    }
}

void expand_key(const uint8_t* bytes, int n, const float* level, const float* scale, float* out) {
    for (int c = 0; c < n; ++c) {
        for (int r = 0; r < kTileRows; ++r) {
            out[c * kTileRows + r] = level[bytes[c * kTileRows + r]] * scale[r];
        }
    }
}

void expand_value(const uint8_t* bytes, int n, int ld, const float* level, const float* scale, float* out, int out_ld) {
    for (int r = 0; r < kTileRows; ++r) {
        const float s = scale[r];
        for (int c = 0; c < n; ++c) {
            out[r * out_ld + c] = level[bytes[r * ld + c]] * s;
        }
    }
}

void transpose(const float* in, int rows, int cols, int in_ld, float* out, int out_ld) {
    constexpr int kBlock = 16; // both sides of a block stay in cache
    for (int r0 = 0; r0 < rows; r0 += kBlock) {
        const int r1 = r0 + kBlock < rows ? r0 + kBlock : rows;
        for (int c0 = 0; c0 < cols; c0 += kBlock) {
            const int c1 = c0 + kBlock < cols ? c0 + kBlock : cols;
            for (int r = r0; r < r1; ++r) {
                for (int c = c0; c < c1; ++c) {
                    out[c * out_ld + r] = in[r * in_ld + c];
                }
            }
        }
    }
}

template <int Rows, int Vectors>
inline void gemm_block(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int k, bool accumulate) {
    Vf sum[Rows][Vectors];
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < Vectors; ++v) {
            sum[i][v] = Vf{};
        }
    }
    for (int x = 0; x < k; ++x) {
        Vf row[Vectors];
        for (int v = 0; v < Vectors; ++v) {
            row[v] = load(b + static_cast<int64_t>(x) * ldb + v * kWidth);
        }
        for (int i = 0; i < Rows; ++i) {
            const Vf q = splat(a[i * lda + x]);
            for (int v = 0; v < Vectors; ++v) {
                sum[i][v] += q * row[v];
            }
        }
    }
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < Vectors; ++v) {
            // What was there is added last: a tile's many small terms would each vanish beside it.
            float* to = c + i * ldc + v * kWidth;
            store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
        }
    }
}

template <int Vectors>
inline void gemm_columns(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int m, int k,
                         bool accumulate) {
    int i = 0;
    for (; i + kBlockRows <= m; i += kBlockRows) {
        gemm_block<kBlockRows, Vectors>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
    }
    a += i * lda;
    c += i * ldc;
    switch (m - i) {
    case 1: gemm_block<1, Vectors>(a, lda, b, ldb, c, ldc, k, accumulate); break;
    case 2: gemm_block<2, Vectors>(a, lda, b, ldb, c, ldc, k, accumulate); break;
    case 3: gemm_block<3, Vectors>(a, lda, b, ldb, c, ldc, k, accumulate); break;
    case 4: gemm_block<4, Vectors>(a, lda, b, ldb, c, ldc, k, accumulate); break;
    case 5: gemm_block<5, Vectors>(a, lda, b, ldb, c, ldc, k, accumulate); break;
    default: break;
    }
}

void gemm(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int m, int n, int k, bool accumulate) {
    int j = 0;
    for (; j + kBlockVectors * kWidth <= n; j += kBlockVectors * kWidth) {
        gemm_columns<kBlockVectors>(a, lda, b + j, ldb, c + j, ldc, m, k, accumulate);
    }
    for (; j < n; j += kWidth) {
        gemm_columns<1>(a, lda, b + j, ldb, c + j, ldc, m, k, accumulate);
    }
}

inline float half_value(uint16_t h) {
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    float f;
    __builtin_memcpy(&f, &magnitude, sizeof f);
    f *= 0x1p112f; // moves the exponent's bias; exact for subnormals too
    uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    bits |= (h & 0x8000u) << 16 | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}

inline Vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<Vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
    return reinterpret_cast<Vf>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
#else
    typedef uint16_t Vh __attribute__((vector_size(kWidth * 2)));
    Vh halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    const Vi h = __builtin_convertvector(halves, Vi);
    const Vi magnitude = (h & 0x7fff) << 13;
    const Vf f = reinterpret_cast<Vf>(magnitude) * splat(0x1p112f);
    return reinterpret_cast<Vf>(reinterpret_cast<Vi>(f) | (h & 0x8000) << 16 |
                                ((magnitude >= 0x0f800000) & 0x7f800000));
#endif
}

void half_to_float(const uint16_t* in, float* out, int n) {
    int i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        store(out + i, load_half(in + i));
    }
    for (; i < n; ++i) {
        out[i] = half_value(in[i]);
    }
}

// A row is converted once for up to this many query heads.
constexpr int kExactHeads = kWidth == 4 ? 4 : 8;

template <int Heads>
inline void exact_scores_of(const uint16_t* const* rows, int n_rows, int n, const float* q, int q_stride, float* s) {
    for (int j = 0; j < n_rows; ++j) {
        const uint16_t* row = rows[j];
        Vf sum[Heads] = {};
        int c = 0;
        for (; c + kWidth <= n; c += kWidth) {
            const Vf x = load_half(row + c);
            for (int h = 0; h < Heads; ++h) {
                sum[h] += x * load(q + h * q_stride + c);
            }
        }
        float rest[Heads] = {};
        for (; c < n; ++c) {
            const float x = half_value(row[c]);
            for (int h = 0; h < Heads; ++h) {
                rest[h] += x * q[h * q_stride + c];
            }
        }
        for (int h = 0; h < Heads; ++h) {
            s[h * kTileRows + j] = lane_sum(sum[h]) + rest[h];
        }
    }
}

void exact_scores(const uint16_t* const* rows, int n_rows, int n, const float* q, int q_stride, int heads, float* s) {
    for (; heads >= kExactHeads; heads -= kExactHeads) {
        exact_scores_of<kExactHeads>(rows, n_rows, n, q, q_stride, s);
        q += kExactHeads * q_stride;
        s += kExactHeads * kTileRows;
    }
    switch (heads) {
    case 1: exact_scores_of<1>(rows, n_rows, n, q, q_stride, s); break;
    case 2: exact_scores_of<2>(rows, n_rows, n, q, q_stride, s); break;
    case 3: exact_scores_of<3>(rows, n_rows, n, q, q_stride, s); break;
    case 4: exact_scores_of<4>(rows, n_rows, n, q, q_stride, s); break;
    case 5: exact_scores_of<5>(rows, n_rows, n, q, q_stride, s); break;
    case 6: exact_scores_of<6>(rows, n_rows, n, q, q_stride, s); break;
    case 7: exact_scores_of<7>(rows, n_rows, n, q, q_stride, s); break;
    default: break;
    }
}

template <int Heads, int Vectors>
inline void exact_values_block(const uint16_t* const* rows, int n_rows, int c, const float* p, float* acc,
                               int acc_stride) {
    Vf sum[Heads][Vectors] = {};
    for (int j = 0; j < n_rows; ++j) {
        Vf x[Vectors];
        for (int v = 0; v < Vectors; ++v) {
            x[v] = load_half(rows[j] + c + v * kWidth);
        }
        for (int h = 0; h < Heads; ++h) {
            const Vf weight = splat(p[h * kTileRows + j]);
            for (int v = 0; v < Vectors; ++v) {
                sum[h][v] += weight * x[v];
            }
        }
    }
    for (int h = 0; h < Heads; ++h) {
        for (int v = 0; v < Vectors; ++v) {
            float* to = acc + h * acc_stride + c + v * kWidth;
            store(to, load(to) + sum[h][v]);
        }
    }
}

template <int Heads>
inline void exact_values_of(const uint16_t* const* rows, int n_rows, int n, const float* p, float* acc,
                            int acc_stride) {
    int c = 0;
    for (; c + 2 * kWidth <= n; c += 2 * kWidth) {
        exact_values_block<Heads, 2>(rows, n_rows, c, p, acc, acc_stride);
    }
    for (; c + kWidth <= n; c += kWidth) {
        exact_values_block<Heads, 1>(rows, n_rows, c, p, acc, acc_stride);
    }
    for (; c < n; ++c) {
        for (int h = 0; h < Heads; ++h) {
            float sum = 0;
            for (int j = 0; j < n_rows; ++j) {
                sum += p[h * kTileRows + j] * half_value(rows[j][c]);
            }
            acc[h * acc_stride + c] += sum;
        }
    }
}

void exact_values(const uint16_t* const* rows, int n_rows, int n, const float* p, int heads, float* acc,
                  int acc_stride) {
    constexpr int kHeads = 4;
    for (; heads >= kHeads; heads -= kHeads) {
        exact_values_of<kHeads>(rows, n_rows, n, p, acc, acc_stride);
        p += kHeads * kTileRows;
        acc += kHeads * acc_stride;
    }
    switch (heads) {
    case 1: exact_values_of<1>(rows, n_rows, n, p, acc, acc_stride); break;
    case 2: exact_values_of<2>(rows, n_rows, n, p, acc, acc_stride); break;
    case 3: exact_values_of<3>(rows, n_rows, n, p, acc, acc_stride); break;
    default: break;
    }
}

float dot(const float* a, const float* b, int n) {
    Vf sum[2] = {};
    int i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        sum[0] += load(a + i) * load(b + i);
        sum[1] += load(a + i + kWidth) * load(b + i + kWidth);
    }
    float rest = 0;
    for (; i < n; ++i) {
        rest += a[i] * b[i];
    }
    return lane_sum(sum[0] + sum[1]) + rest;
}

void axpy(float a, const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) {
        y[i] += a * x[i];
    }
}

void scale_vector(float a, float* y, int n) {
    for (int i = 0; i < n; ++i) {
        y[i] *= a;
    }
}

bool softmax(float* s, float add, float softcap, const float* bias, float bias_scale, RowState& state) {
    constexpr int kVectors = kTileRows / kWidth;
    Vf x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        x[v] = load(s + v * kWidth) + add;
    }
    if (softcap > 0) {
        for (Vf& v : x) {
            v = tanh_vector(v) * softcap;
        }
    }
    if (bias != nullptr) {
        for (int v = 0; v < kVectors; ++v) {
            x[v] += load(bias + v * kWidth) * bias_scale;
        }
    }
    Vf top = x[0];
    for (int v = 1; v < kVectors; ++v) {
        top = vmax(top, x[v]);
    }
    const float tile_max = lane_max(top);
    state.rescale = 1;
    if (tile_max == -__builtin_inff()) {
        return false;
    }
    if (tile_max != tile_max) { // a query that is not finite: its output shall say so
        state.max = 0;
        state.sum = tile_max;
        return false;
    }
    if (tile_max < state.max - 14.0f) { // 64 rows * 2^-14 is far above kNegligible: no need to look closer before
        const float bound = kTileRows * __builtin_exp2f(tile_max - state.max);
        if (state.skipped + bound <= kNegligible * state.sum) {
            state.skipped += bound;
            return false;
        }
    }
    if (tile_max > state.max) {
        state.rescale = state.max == -__builtin_inff() ? 0.0f : __builtin_exp2f(state.max - tile_max);
        state.max = tile_max;
        state.sum *= state.rescale;
        state.skipped *= state.rescale;
        state.code_sum *= state.rescale;
    }
    Vf sum{};
    for (int v = 0; v < kVectors; ++v) {
        const Vf p = exp2_vector(x[v] - state.max);
        sum += p;
        store(s + v * kWidth, p);
    }
    state.sum += lane_sum(sum);
    return true;
}

constexpr Kernels float_kernels() {
    Kernels k{};
    k.unpack_key = unpack_key;
    k.unpack_value = unpack_value;
    k.expand_key = expand_key;
    k.expand_value = expand_value;
    k.transpose = transpose;
    k.gemm = gemm;
    k.half_to_float = half_to_float;
    k.exact_scores = exact_scores;
    k.exact_values = exact_values;
    k.dot = dot;
    k.axpy = axpy;
    k.scale = scale_vector;
    k.softmax = softmax;
    return k;
}
