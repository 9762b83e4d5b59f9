// Hadamard matrices of order 12 and 20, by Paley's first construction: for a prime q = 3 mod 4, H = I + S with
// S = [0, 1...1; -1...-1, Q] and Q[i][j] = chi(i - j), chi the quadratic character mod q. H H^T = (q + 1) I.
// R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933). Not symmetric: the inverse is the transpose.
#pragma once

namespace turboquant {

template <int ORDER>
struct HadamardMatrix {
    float at[ORDER][ORDER];
};

template <int ORDER>
constexpr HadamardMatrix<ORDER> paley_matrix() {
    constexpr int kQ = ORDER - 1;
    bool is_square[kQ] = {};
    for (int i = 1; i < kQ; ++i) {
        is_square[i * i % kQ] = true;
    }
    HadamardMatrix<ORDER> h = {};
    for (int a = 0; a < ORDER; ++a) {
        for (int b = 0; b < ORDER; ++b) {
            if (a == b || a == 0) {
                h.at[a][b] = 1;
            } else if (b == 0) {
                h.at[a][b] = -1;
            } else {
                h.at[a][b] = is_square[(a - b + kQ) % kQ] ? 1.0F : -1.0F;
            }
        }
    }
    return h;
}

inline constexpr HadamardMatrix<12> kHadamard12 = paley_matrix<12>();
inline constexpr HadamardMatrix<20> kHadamard20 = paley_matrix<20>();

} // namespace turboquant
