// Conditioning: checks, the mean of a block of positions, and the record that saved rows and profiles carry.
#include "turboquant/conditioning.h"

#include "codec/kernels.h"
#include "conditioning/bytes.h"
#include "conditioning/pair_mean.h"
#include "turboquant/codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <utility>

namespace turboquant {

namespace {

// docs/format.md, "Conditioning record". Little-endian.
constexpr uint32_t kMagic = 0x434b5154; // "TQKC"
constexpr uint8_t kVersion = 1;
constexpr uint8_t kHasMu = 1;
constexpr uint8_t kHasLambda = 2;
constexpr size_t kChecksumAt = 12;
constexpr size_t kHeaderBytes = 16;
constexpr size_t kPairBytes = 8;

constexpr float kLargestHalf = 65504.0F;
constexpr float kSmallestNormalHalf = 6.103515625e-5F; // 2^-14

float through_half(float x) {
    return from_half(to_half(x));
}

uint32_t record_checksum(const uint8_t* record, size_t n) {
    return crc32(crc32(0, record, kChecksumAt), record + kHeaderBytes, n - kHeaderBytes);
}

void append_halves(std::vector<uint8_t>& out, const std::vector<float>& values) {
    for (const float v : values) {
        append(out, to_half(v), 2);
    }
}

std::vector<float> take_halves(const uint8_t*& in, size_t n) {
    std::vector<float> values(n);
    for (float& v : values) {
        v = from_half(static_cast<uint16_t>(get_at(in, 2)));
        in += 2;
    }
    return values;
}

bool any_not_zero(const uint8_t* begin, const uint8_t* end) {
    return std::any_of(begin, end, [](uint8_t byte) { return byte != 0; });
}

} // namespace

Status check_conditioning(const Conditioning& conditioning, int head_size, int kv_heads) {
    if (head_size < 1 || head_size > kMaxHeadSize || kv_heads < 1 || kv_heads > 0xffff) {
        return invalid("conditioning: head size " + std::to_string(head_size) + " with " + std::to_string(kv_heads) +
                       " KV heads; 1.." + std::to_string(kMaxHeadSize) + " and 1..65535 are possible");
    }
    const size_t n = static_cast<size_t>(head_size) * static_cast<size_t>(kv_heads);
    const auto size_is_wrong = [n](const std::vector<float>& v) { return !v.empty() && v.size() != n; };
    if (size_is_wrong(conditioning.mu) || size_is_wrong(conditioning.lambda)) {
        return invalid("conditioning: " + std::to_string(conditioning.mu.size()) + " means and " +
                       std::to_string(conditioning.lambda.size()) + " factors; expected " + std::to_string(n) + " (" +
                       std::to_string(kv_heads) + " KV heads of " + std::to_string(head_size) + ") or none");
    }
    if (!std::all_of(conditioning.mu.begin(), conditioning.mu.end(), [](float m) { return std::isfinite(m); })) {
        return invalid("conditioning: a mean is not finite");
    }
    if (!std::all_of(conditioning.lambda.begin(), conditioning.lambda.end(),
                     [](float l) { return l > 0 && std::isfinite(l) && std::isfinite(1.0F / l) && 1.0F / l > 0; })) {
        return invalid("conditioning: a factor or its inverse is not positive and finite");
    }
    std::vector<bool> taken(static_cast<size_t>(head_size), false);
    for (const RopePair& pair : conditioning.rope) {
        for (const uint16_t channel : {pair.first, pair.second}) {
            if (channel >= head_size || taken[channel]) {
                return invalid("conditioning: channel " + std::to_string(channel) +
                               " is in two RoPE pairs or outside a head of " + std::to_string(head_size));
            }
            taken[channel] = true;
        }
        if (!std::isfinite(pair.theta)) {
            return invalid("conditioning: the angle of the pair of channels " + std::to_string(pair.first) + " and " +
                           std::to_string(pair.second) + " is not finite");
        }
    }
    return {};
}

std::complex<double> block_average(double theta) {
    // The geometric series. theta comes from a float, so it is 2 pi k only for k = 0.
    const double half = std::sin(theta / 2);
    if (half == 0) {
        return 1;
    }
    const double modulus = std::sin(theta * kPositionBlock / 2) / (kPositionBlock * half);
    return std::polar(1.0, theta * (kPositionBlock - 1) / 2) * modulus;
}

void block_phases(const std::vector<RopePair>& rope, int block, float* cosine, float* sine) {
    for (size_t i = 0; i < rope.size(); ++i) {
        // Exact before the reduction: 24 bits of theta times at most 24 of the position.
        const double angle = static_cast<double>(rope[i].theta) * (static_cast<double>(block) * kPositionBlock);
        cosine[i] = static_cast<float>(std::cos(angle));
        sine[i] = static_cast<float>(std::sin(angle));
    }
}

void block_mean(const Conditioning& conditioning, int head_size, int kv_heads, int block, float* out) {
    const size_t n = static_cast<size_t>(head_size) * static_cast<size_t>(kv_heads);
    if (conditioning.mu.empty()) {
        std::fill_n(out, n, 0.0F);
        return;
    }
    std::copy_n(conditioning.mu.data(), n, out);
    for (const RopePair& pair : conditioning.rope) {
        const double theta = pair.theta;
        const std::complex<double> turn =
            block_average(theta) * std::polar(1.0, theta * (static_cast<double>(block) * kPositionBlock));
        for (float* head = out; head < out + n; head += head_size) {
            const std::complex<double> mean = std::complex<double>(head[pair.first], head[pair.second]) * turn;
            head[pair.first] = static_cast<float>(mean.real());
            head[pair.second] = static_cast<float>(mean.imag());
        }
    }
}

Conditioning storable(const Conditioning& conditioning) {
    Conditioning out = conditioning;
    for (float& m : out.mu) {
        m = through_half(std::clamp(m, -kLargestHalf, kLargestHalf));
    }
    for (float& l : out.lambda) {
        l = through_half(std::clamp(l, kSmallestNormalHalf, kLargestHalf));
    }
    return out;
}

std::vector<uint8_t> write_conditioning(const Conditioning& conditioning, int head_size, int kv_heads) {
    const Conditioning c = storable(conditioning);
    std::vector<uint8_t> out;
    out.reserve(kHeaderBytes + 2 * (c.mu.size() + c.lambda.size()) + kPairBytes * c.rope.size());
    append(out, kMagic, 4);
    append(out, kVersion, 1);
    append(out, (c.mu.empty() ? 0 : kHasMu) | (c.lambda.empty() ? 0 : kHasLambda), 1);
    append(out, static_cast<uint64_t>(head_size), 2);
    append(out, static_cast<uint64_t>(kv_heads), 2);
    append(out, c.rope.size(), 2);
    append(out, 0, 4);
    append_halves(out, c.mu);
    append_halves(out, c.lambda);
    for (const RopePair& pair : c.rope) {
        append(out, pair.first, 2);
        append(out, pair.second, 2);
        append(out, std::bit_cast<uint32_t>(pair.theta), 4);
    }
    put_at(out.data() + kChecksumAt, record_checksum(out.data(), out.size()), 4);
    return out;
}

Status read_conditioning(const uint8_t* in, size_t n, int head_size, int kv_heads, Conditioning& out) {
    const std::string what = "conditioning record: ";
    if (n < kHeaderBytes || get_at(in, 4) != kMagic) {
        return invalid(what + "damaged (no such record begins here)");
    }
    if (in[4] != kVersion) {
        return invalid(what + "version " + std::to_string(in[4]) + "; this library reads version " +
                       std::to_string(kVersion));
    }
    const uint8_t flags = in[5];
    const auto heads = static_cast<size_t>(get_at(in + 8, 2));
    const auto channels = static_cast<size_t>(get_at(in + 6, 2));
    const auto n_pairs = static_cast<size_t>(get_at(in + 10, 2));
    const size_t n_parts = ((flags & kHasMu) != 0 ? 1 : 0) + ((flags & kHasLambda) != 0 ? 1 : 0);
    const size_t size = kHeaderBytes + 2 * n_parts * heads * channels + kPairBytes * n_pairs;
    if (size > n || get_at(in + kChecksumAt, 4) != record_checksum(in, size) || any_not_zero(in + size, in + n) ||
        (flags & ~(kHasMu | kHasLambda)) != 0) {
        return invalid(what + "damaged (wrong checksum or length)");
    }
    if (channels != static_cast<size_t>(head_size) || heads != static_cast<size_t>(kv_heads)) {
        return invalid(what + "made for " + std::to_string(heads) + " KV heads of " + std::to_string(channels) +
                       ", these are " + std::to_string(kv_heads) + " of " + std::to_string(head_size));
    }
    Conditioning read;
    const uint8_t* at = in + kHeaderBytes;
    if ((flags & kHasMu) != 0) {
        read.mu = take_halves(at, heads * channels);
    }
    if ((flags & kHasLambda) != 0) {
        read.lambda = take_halves(at, heads * channels);
    }
    for (size_t i = 0; i < n_pairs; ++i, at += kPairBytes) {
        read.rope.push_back({static_cast<uint16_t>(get_at(at, 2)), static_cast<uint16_t>(get_at(at + 2, 2)),
                             std::bit_cast<float>(static_cast<uint32_t>(get_at(at + 4, 4)))});
    }
    if (Status status = check_conditioning(read, head_size, kv_heads); !status.ok()) {
        return status;
    }
    out = std::move(read);
    return {};
}

uint32_t conditioning_id(const Conditioning& conditioning, int head_size, int kv_heads) {
    if (conditioning.empty()) {
        return 0;
    }
    const std::vector<uint8_t> record = write_conditioning(conditioning, head_size, kv_heads);
    const uint64_t hash = hash_bytes(record.data(), record.size());
    const auto id = static_cast<uint32_t>(hash ^ (hash >> 32));
    return id != 0 ? id : 1;
}

} // namespace turboquant
