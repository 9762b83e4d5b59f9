// Key conditioning: what is taken off keys before the codebook sees them, and where those numbers come from.
//
// Codes are those of R(lambda * (k - mu)); a query asks with R(q / lambda) and adds <q, mu>. Neither changes what
// attention computes from unquantised keys; both make the quantiser's error smaller. mu follows RoPE: a key's pair of
// channels, read as a complex number, is turned by theta * position, so a mean over positions is only good for those
// positions. What stays is the mean BEFORE the turn, c. The mean after it, over the kPositionBlock positions of block b,
// is c * A * e^(i theta kPositionBlock b) with A = mean of e^(i theta j), j = 0..kPositionBlock-1: one mu per block.
// Derivation and measurements: docs/format.md, docs/quality.md.
#pragma once

#include "turboquant/status.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace turboquant {

inline constexpr int kPositionBlock = 256; // positions that share one mu
inline constexpr int kMaxPositionBlock = 0xffff;

// Two channels of a head that turn together: at position p, x[first] + i x[second] is e^(i theta p) times what it was.
struct RopePair {
    uint16_t first = 0;
    uint16_t second = 0;
    float theta = 0; // radians a position; any RoPE scaling of it included
};

struct Conditioning {
    std::vector<float> mu;           // [kv_head][channel], before the turn where a pair turns; empty: zeros
    std::vector<float> lambda;       // [kv_head][channel], positive, finite; empty: ones
    std::vector<RopePair> rope = {}; // of every head; channels in no pair do not turn. Empty: mu is one constant
    bool empty() const { return mu.empty() && lambda.empty(); }
};

// Error (one line) unless the sizes are kv_heads * head_size (or 0), values are finite, lambda and 1 / lambda positive and
// finite, pairs within a head with no channel twice, thetas finite.
Status check_conditioning(const Conditioning& conditioning, int head_size, int kv_heads);

// The block of a position: position / kPositionBlock, held within 0..kMaxPositionBlock.
constexpr int position_block(int64_t position) {
    const int64_t block = position < 0 ? 0 : position / kPositionBlock;
    return static_cast<int>(block > kMaxPositionBlock ? kMaxPositionBlock : block);
}

// e^(i theta kPositionBlock block) of every pair: cosine[n_pairs], sine[n_pairs]. Accurate for any block (double inside).
void block_phases(const std::vector<RopePair>& rope, int block, float* cosine, float* sine);

// mu of one block of all heads, [kv_head][channel]: zeros where mu is empty. `out` has kv_heads * head_size entries.
void block_mean(const Conditioning& conditioning, int head_size, int kv_heads, int block, float* out);

// A conditioning as bytes, for saved rows and profiles: shapes, fp16 mu and lambda, pairs, checksum. Little-endian.
// What comes back is exactly what went in once it has been through `storable`, which rounds mu and lambda to fp16.
Conditioning storable(const Conditioning& conditioning);
std::vector<uint8_t> write_conditioning(const Conditioning& conditioning, int head_size, int kv_heads);
// Error: damaged, another version, or not these shapes. Bytes after the record must be zero.
Status read_conditioning(const uint8_t* in, size_t n, int head_size, int kv_heads, Conditioning& out);
// Of mu, lambda and rope as write_conditioning has them: the id that saved rows carry. 0 only when it is empty().
uint32_t conditioning_id(const Conditioning& conditioning, int head_size, int kv_heads);

// Sums over keys and queries, and the conditioning that follows from them. Formulas: docs/quality.md, "Statistics".
// Not thread-safe. Sums are doubles in order of arrival: the same rows give the same conditioning.
class KeyStatistics {
public:
    KeyStatistics(int head_size, int kv_heads, std::vector<RopePair> rope);

    // A key row, [kv_head][channel] floats, as it is stored (after RoPE). The first positions of a sequence (attention
    // sinks) are the caller's to leave out.
    void add_key(const float* key, int64_t position);
    // One query head (after RoPE, unscaled); kv_head: the KV head it asks.
    void add_query(const float* query, int kv_head);
    int64_t keys() const { return n_keys_; }

    // Whether this row nearly repeats (before the turn) at least `times` of the rows remembered so far; otherwise it is
    // remembered. Guards against degenerate texts (whitespace, rulers). distance: how far apart two rows may be that
    // count as the same, squared, over all heads; a share of the rows' energy would not do, as a mean that dwarfs what
    // the tokens say makes all rows alike by that. Remembers at most 1024 rows.
    bool repeats(const float* key, int64_t position, int times, double distance);

    // No keys or no queries: empty.
    Conditioning conditioning() const;

    // How much of the keys' energy is left when this conditioning's block means are taken off: sum |k - mu|^2 /
    // sum |k|^2 over the rows added. Above 1: these keys are not those that it was made from. 1 for no rows or no mu,
    // infinity when it has other shapes or turns otherwise.
    double residual(const Conditioning& conditioning) const;

private:
    // The angles of all pairs at one position: a row is turned back more than once, and its neighbours share its block.
    struct Turn {
        int64_t position = -1;
        std::vector<double> cosine; // [pair]
        std::vector<double> sine;
    };
    void turn_back(const float* key, int64_t position, Turn& turn, float* out) const;
    int head_size_;
    int kv_heads_;
    std::vector<RopePair> rope_;
    int64_t n_keys_ = 0;
    int64_t n_queries_ = 0;
    std::vector<double> key_sum_;       // turned back, [kv_head][channel]
    std::vector<double> block_sum_;     // turned back to the start of the row's block, [kv_head][channel]
    std::vector<double> key_squares_;   // [kv_head][channel]
    std::vector<double> query_squares_; // [kv_head][channel]
    std::vector<float> remembered_;     // rows turned back
    std::vector<float> sketches_;       // of these, some channels each: enough to see that most are far apart
    std::vector<float> scratch_;
    Turn row_turn_;
    Turn block_turn_;
};

} // namespace turboquant
