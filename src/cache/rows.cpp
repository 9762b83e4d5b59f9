#include "cache/rows.h"

#include "codec/codec_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace turboquant {

namespace {

constexpr uint64_t kTagMagic = 0xb5c94d; // no run of equal bits, so that no regular row of values looks like it
constexpr int kPinnedBit = 24;
constexpr int kAgeBit = 25;
constexpr int kBlockBit = kAgeBit + kTagAgeBits;
constexpr int kChecksumBit = kBlockBit + kTagBlockBits;
static_assert(kChecksumBit == 57);
constexpr uint64_t low_bits(int n) {
    return (uint64_t{1} << n) - 1;
}
constexpr uint64_t kTagFields = (uint64_t{1} << kChecksumBit) - 1;
constexpr uint32_t kInfinityBits = 0x7f800000U;
constexpr uint32_t kHalfOverflowBits = 0x477ff000U; // 65520: what rounds to infinity in fp16

uint64_t tag_checksum(uint64_t fields) {
    return (fields * 0x9e3779b97f4a7c15U) >> kChecksumBit;
}

int tag_elements(int head_size, int kv_head) {
    return std::clamp(kTagElements - kv_head * head_size, 0, head_size);
}

} // namespace

uint64_t make_tag(const Tag& tag) {
    const auto block = std::min(static_cast<uint64_t>(tag.block), low_bits(kTagBlockBits));
    const uint64_t fields = kTagMagic | uint64_t{tag.pinned} << kPinnedBit |
                            (tag.age & low_bits(kTagAgeBits)) << kAgeBit | block << kBlockBit;
    return fields | tag_checksum(fields) << kChecksumBit;
}

bool read_tag(const uint16_t* row, Tag& tag, bool& damaged) {
    uint64_t bits = 0;
    for (int i = 0; i < kTagElements; ++i) {
        bits |= static_cast<uint64_t>(row[i] & 1U) << i;
    }
    if ((bits & 0xffffffU) != kTagMagic) {
        return false;
    }
    damaged = tag_checksum(bits & kTagFields) != bits >> kChecksumBit;
    tag.pinned = (bits >> kPinnedBit & 1U) != 0;
    tag.age = bits >> kAgeBit & low_bits(kTagAgeBits);
    tag.block = static_cast<int>(bits >> kBlockBit & low_bits(kTagBlockBits));
    return true;
}

void put_tag(uint16_t* values, int first, int n, uint64_t tag) {
    const int end = std::min(n, kTagElements - first);
    for (int i = 0; i < end; ++i) {
        values[i] = static_cast<uint16_t>((values[i] & 0xfffeU) | (tag >> (first + i) & 1U));
    }
}

void round_head(const Store::Impl& impl, const float* x, uint16_t* h, HeadNotes& notes) {
    const int n = impl.shape.head_size;
    const int padded = round_up(n, kVectorPadding);
    alignas(64) float v[kMaxHeadSize];
    if (n < padded) { // the kernel reads whole vectors
        std::memcpy(v, x, static_cast<size_t>(n) * sizeof(float));
        std::fill(v + n, v + padded, 0.0F);
        x = v;
    }
    const uint32_t top = impl.kernels->round_to_half(x, padded, h);
    if (top >= kInfinityBits) {
        std::fill(h, h + padded, uint16_t{0});
        ++notes.nonfinite;
    } else if (top >= kHalfOverflowBits) {
        ++notes.saturated;
    }
    std::fill(h + padded, h + padded + kVectorPadding, uint16_t{0});
}

void clear_tag_bits(const Store::Impl& impl, int kv_head, uint16_t* h) {
    if (impl.shape.row_elements() < kTagElements) {
        return;
    }
    const int n = tag_elements(impl.shape.head_size, kv_head);
    for (int i = 0; i < n; ++i) {
        h[i] &= 0xfffeU;
    }
}

void scatter_codes(Store::Impl& impl, int64_t row, int kv_head, const uint8_t* codes) {
    uint8_t* const tile = impl.tile_codes(kv_head, row / kTileRows);
    const int r = static_cast<int>(row % kTileRows);
    for (int p = 0; p < impl.tile.n_planes; ++p) {
        const Plane& plane = impl.tile.planes[p];
        const PlaneShape& shape = impl.plane_shapes[p];
        if (impl.tile.side == Side::key) {
            impl.kernels->put_key_row(tile + plane.offset, shape, r, codes);
        } else {
            impl.kernels->put_value_row(tile + plane.offset, shape, plane.padded_channels, r, codes);
        }
    }
}

void gather_codes(const Store::Impl& impl, int64_t row, int kv_head, uint8_t* codes) {
    const uint8_t* const tile = impl.tile_codes(kv_head, row / kTileRows);
    const int r = static_cast<int>(row % kTileRows);
    const int n = impl.shape.head_size;
    std::fill(codes, codes + n, uint8_t{0});
    for (int p = 0; p < impl.tile.n_planes; ++p) {
        const Plane& plane = impl.tile.planes[p];
        const unsigned mask = (1U << plane.width) - 1U;
        for (int c = 0; c < n; ++c) {
            const FieldPosition at = field_position(impl.tile.side, plane, r, c);
            codes[c] |= static_cast<uint8_t>((static_cast<unsigned>(tile[plane.offset + at.byte]) >> at.bit & mask)
                                             << plane.shift);
        }
    }
}

void RowEncoder::add(int64_t row, int kv_head) {
    Store::Impl& m = impl_;
    if (m.options.emulate_q4_0) {
        emulate_q4_0(m, row, kv_head, next());
        return;
    }
    const size_t head_at = static_cast<size_t>(kv_head) * static_cast<size_t>(m.shape.head_size);
    const float* mu = m.conditioner.constant_mean().data() + head_at;
    if (m.conditioner.turns()) {
        if (const int entry = m.row_entry(row); entry == m.mean_entry) {
            mu = m.mean.data() + head_at;
        } else {
            if (entry != mean_entry_ || kv_head != mean_head_) {
                uint16_t* const added = next();
                if (n_ > 0) { // earlier rows wait with the other mean
                    flush();
                    std::copy_n(added, m.shape.head_size + kVectorPadding, next());
                }
                m.conditioner.head_mean(kv_head, entry, mean_);
                std::fill_n(mean_ + m.shape.head_size, kConditionerPadding, 0.0F);
                mean_entry_ = entry;
                mean_head_ = kv_head;
            }
            mu = mean_;
        }
    }
    row_[n_] = row;
    head_[n_] = kv_head;
    mu_[n_] = mu;
    if (++n_ == kEncodeItems) {
        flush();
    }
}

void RowEncoder::flush() {
    Store::Impl& m = impl_;
    const KernelRule rule = m.shape.side == Side::key ? KernelRule::unbiased : KernelRule::matched;
    EncodeItem items[kEncodeItems];
    for (int b = 0; b < m.n_blocks && n_ > 0; ++b) {
        const RotationBlock& block = m.rotation.blocks()[static_cast<size_t>(b)];
        for (int i = 0; i < n_; ++i) {
            const ptrdiff_t head_at = static_cast<ptrdiff_t>(head_[i]) * m.shape.head_size;
            items[i].h = h_[i] + block.offset;
            items[i].mu = mu_[i] + block.offset;
            items[i].factor = m.conditioner.encode_factor().data() + head_at + block.offset;
            // The block's padding is written too; the next block's codes then cover it.
            items[i].codes = codes_[i] + block.offset;
            items[i].scale = m.tile_scales(head_[i], row_[i] / kTileRows) + row_[i] % kTileRows + b * kTileRows;
        }
        m.kernels->encode_rows(items, n_, block.size, *m.encode_table, rule);
        for (int i = 0; i < n_; ++i) {
            notes_.saturated += items[i].note & static_cast<uint8_t>(EncodeNote::saturated);
            notes_.nonfinite += (items[i].note & static_cast<uint8_t>(EncodeNote::nonfinite)) != 0 ? 1U : 0U;
        }
    }
    for (int i = 0; i < n_; ++i) {
        std::fill(codes_[i] + m.shape.head_size, codes_[i] + round_up(m.shape.head_size, 32), uint8_t{0});
        scatter_codes(m, row_[i], head_[i], codes_[i]);
    }
    n_ = 0;
}

void encode_head(Store::Impl& impl, int64_t row, int kv_head, const uint16_t* h, HeadNotes& notes) {
    RowEncoder encoder(impl, notes);
    std::copy_n(h, round_up(impl.shape.head_size, kVectorPadding) + kVectorPadding, encoder.next());
    encoder.add(row, kv_head);
    encoder.flush();
}

// A block of 32 as q4_0 stores it: the largest magnitude becomes -8, the rest are rounded to steps of an eighth of it.
static void through_q4_0(float* y) {
    const float top = *std::max_element(y, y + 32, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    const float inverse = top != 0 ? -8 / top : 0.0F; // the scale is rounded to fp16 only where it is stored
    const float step = from_half(to_half(top / -8));
    for (int i = 0; i < 32; ++i) {
        const int code = std::clamp(static_cast<int>(y[i] * inverse + 8.5F), 0, 15);
        y[i] = static_cast<float>(code - 8) * step;
    }
}

void emulate_q4_0(Store::Impl& impl, int64_t row, int kv_head, const uint16_t* h) {
    const int n = impl.shape.head_size;
    const size_t head_at = static_cast<size_t>(kv_head) * static_cast<size_t>(n);
    const std::vector<float>& lambda = impl.conditioner.conditioning().lambda;
    float mean[kMaxHeadSize];
    float y[kMaxHeadSize] = {};
    impl.conditioner.head_mean(kv_head, impl.row_entry(row), mean);
    const auto factor = [&](int c) { return lambda.empty() ? 1.0F : lambda[head_at + static_cast<size_t>(c)]; };
    for (int c = 0; c < n; ++c) {
        y[c] = factor(c) * (from_half(h[c]) - mean[c]);
    }
    const int part = impl.emulated_rotation.head_size();
    for (int begin = 0; begin < n; begin += part) {
        impl.emulated_rotation.forward(y + begin, y + begin);
        for (int block = begin; block < begin + part; block += 32) {
            through_q4_0(y + block);
        }
        impl.emulated_rotation.inverse(y + begin, y + begin);
    }
    auto* const out = reinterpret_cast<uint16_t*>(impl.plain_row(kv_head, row));
    for (int c = 0; c < n; ++c) {
        out[c] = to_half(y[c] / factor(c) + mean[c]);
    }
}

namespace {

void widen_entries(Store::Impl& impl) {
    PageMemory wide;
    if (!wide.allocate(impl.row_entries.size() * sizeof(uint16_t))) {
        throw std::bad_alloc();
    }
    std::copy_n(impl.row_entries.data(), impl.row_entries.size(), reinterpret_cast<uint16_t*>(wide.data()));
    impl.row_entries.swap(wide);
    impl.entry_size = sizeof(uint16_t);
}

} // namespace

int find_entry(Store::Impl& impl, int block) {
    if (impl.row_entries.size() == 0) {
        return 0;
    }
    if (impl.mean_entry >= 0 && impl.blocks[static_cast<size_t>(impl.mean_entry)] == block) {
        return impl.mean_entry; // the rule while a sequence grows
    }
    if (impl.entry_size == 1 && impl.blocks.size() == kNarrowEntries && !impl.block_entries.contains(block)) {
        widen_entries(impl);
    }
    const auto [found, is_new] = impl.block_entries.try_emplace(block, static_cast<uint16_t>(impl.blocks.size()));
    if (is_new) {
        impl.blocks.push_back(block);
        impl.conditioner.add_block(block);
    }
    return found->second;
}

void set_entry(Store::Impl& impl, int64_t row, int entry) {
    if (impl.row_entries.size() == 0) {
        return;
    }
    if (impl.entry_size == 1) {
        impl.row_entries.data()[row] = static_cast<uint8_t>(entry);
    } else {
        reinterpret_cast<uint16_t*>(impl.row_entries.data())[row] = static_cast<uint16_t>(entry);
    }
}

void decode_head(const Store::Impl& impl, const Conditioner& conditioner, int64_t row, int kv_head, float* x) {
    uint8_t codes[kMaxHeadSize];
    gather_codes(impl, row, kv_head, codes);
    const uint16_t* const scales = impl.tile_scales(kv_head, row / kTileRows) + row % kTileRows;
    for (int b = 0; b < impl.n_blocks; ++b) {
        const RotationBlock& block = impl.rotation.blocks()[static_cast<size_t>(b)];
        decode_block(codes + block.offset, block.size, *impl.book, scales[b * kTileRows], x + block.offset);
    }
    impl.rotation.inverse(x, x);
    const size_t head_at = static_cast<size_t>(kv_head) * static_cast<size_t>(impl.shape.head_size);
    const std::vector<float>& lambda = conditioner.conditioning().lambda;
    float mean[kMaxHeadSize];
    conditioner.head_mean(kv_head, conditioner.turns() ? impl.row_entry(row) : 0, mean);
    for (size_t c = 0; c < static_cast<size_t>(impl.shape.head_size); ++c) {
        if (!lambda.empty()) {
            x[c] /= lambda[head_at + c];
        }
        x[c] += mean[c];
    }
}

void set_bit(std::vector<uint64_t>& bits, int64_t row, bool value) {
    const uint64_t bit = uint64_t{1} << (row % 64);
    uint64_t& word = bits[static_cast<size_t>(row / 64)];
    word = value ? word | bit : word & ~bit;
}

int Store::Impl::find_slot(int64_t row) const {
    if (!is_exact(row)) {
        return -1;
    }
    const auto found = std::find(slot_row.begin(), slot_row.end(), row);
    return static_cast<int>(found - slot_row.begin());
}

void release_slot(Store::Impl& impl, int slot) {
    const auto s = static_cast<size_t>(slot);
    set_bit(impl.exact_rows, impl.slot_row[s], false);
    --(impl.slot_pinned[s] != 0 ? impl.n_pinned : impl.n_ring);
    impl.slot_row[s] = -1;
    impl.slot_pinned[s] = 0;
}

int free_slot(const Store::Impl& impl) {
    return static_cast<int>(std::find(impl.slot_row.begin(), impl.slot_row.end(), -1) - impl.slot_row.begin());
}

int oldest_ring_slot(const Store::Impl& impl) {
    int oldest = -1;
    for (int s = 0; s < impl.n_slots; ++s) {
        const auto i = static_cast<size_t>(s);
        if (impl.slot_row[i] >= 0 && impl.slot_pinned[i] == 0 &&
            (oldest < 0 || impl.slot_age[i] < impl.slot_age[static_cast<size_t>(oldest)])) {
            oldest = s;
        }
    }
    return oldest;
}

int longest_pinned_slot(const Store::Impl& impl) {
    int longest = -1;
    for (int s = 0; s < impl.n_slots; ++s) {
        const auto i = static_cast<size_t>(s);
        if (impl.slot_pinned[i] != 0 &&
            (longest < 0 || impl.slot_pin_order[i] < impl.slot_pin_order[static_cast<size_t>(longest)])) {
            longest = s;
        }
    }
    return longest;
}

void take_slot(Store::Impl& impl, int slot, int64_t row, uint64_t age, bool pinned) {
    const auto s = static_cast<size_t>(slot);
    impl.slot_row[s] = row;
    impl.slot_age[s] = age;
    impl.slot_pinned[s] = pinned ? 1 : 0;
    if (pinned) {
        impl.slot_pin_order[s] = ++impl.pin_clock;
    }
    ++(pinned ? impl.n_pinned : impl.n_ring);
    set_bit(impl.exact_rows, row, true);
}

} // namespace turboquant
