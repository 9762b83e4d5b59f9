// Native rows: a row as opaque bytes, for a host that saves and restores caches. docs/format.md has the picture.
#include "cache/rows.h"
#include "conditioning/bytes.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace turboquant {

namespace {

// A row of codes: this header, then the scales of all heads, then each head's codes packed without gaps. Little-endian.
// The magic is two fp16 NaNs, so no row of fp16 values that this library stores can begin with it.
constexpr uint32_t kMagic = 0x7f517f54; // "T\x7fQ\x7f"
constexpr uint8_t kVersion = 2;
constexpr size_t kHeaderBytes = 24;
constexpr size_t kChecksumAt = 20;
// A piece of the conditioning's record behind the codes: index and count, then its bytes up to the row's end.
constexpr size_t kPieceHeaderBytes = 4;
constexpr size_t kLeastPiece = 16;

struct Header {
    uint32_t magic = kMagic;
    uint8_t version = kVersion;
    uint8_t side = 0;
    uint8_t bits = 0;
    uint8_t reserved = 0;
    uint16_t head_size = 0;
    uint16_t kv_heads = 0;
    uint32_t conditioning_id = 0;
    uint16_t block = 0;
    uint16_t reserved_too = 0;
    uint32_t checksum = 0;
};

void put_header(const Header& h, uint8_t* out) {
    put_at(out, h.magic, 4);
    put_at(out + 4, h.version, 1);
    put_at(out + 5, h.side, 1);
    put_at(out + 6, h.bits, 1);
    put_at(out + 7, h.reserved, 1);
    put_at(out + 8, h.head_size, 2);
    put_at(out + 10, h.kv_heads, 2);
    put_at(out + 12, h.conditioning_id, 4);
    put_at(out + 16, h.block, 2);
    put_at(out + 18, h.reserved_too, 2);
    put_at(out + 20, h.checksum, 4);
}

Header get_header(const uint8_t* in) {
    Header h;
    h.magic = static_cast<uint32_t>(get_at(in, 4));
    h.version = in[4];
    h.side = in[5];
    h.bits = in[6];
    h.reserved = in[7];
    h.head_size = static_cast<uint16_t>(get_at(in + 8, 2));
    h.kv_heads = static_cast<uint16_t>(get_at(in + 10, 2));
    h.conditioning_id = static_cast<uint32_t>(get_at(in + 12, 4));
    h.block = static_cast<uint16_t>(get_at(in + 16, 2));
    h.reserved_too = static_cast<uint16_t>(get_at(in + 18, 2));
    h.checksum = static_cast<uint32_t>(get_at(in + 20, 4));
    return h;
}

// Every step is a bijection of the state for a given word, so a change of one word always changes the 64-bit state.
uint64_t mix(uint64_t h, const uint8_t* in, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        h = (h ^ get_at(in + i, 8)) * 0x9e3779b97f4a7c15U;
        h ^= h >> 32;
    }
    h = (h ^ get_at(in + i, static_cast<int>(n - i))) * 0x9e3779b97f4a7c15U;
    return h ^ (h >> 32);
}

uint32_t row_checksum(const uint8_t* row, size_t n) {
    return static_cast<uint32_t>(mix(mix(0, row, kChecksumAt), row + kHeaderBytes, n - kHeaderBytes));
}

size_t packed_bytes(const Store::Impl& m) {
    return (static_cast<size_t>(m.shape.head_size) * static_cast<size_t>(m.options.bits) + 7) / 8;
}

size_t coded_row_bytes(const Store::Impl& m) {
    const auto heads = static_cast<size_t>(m.shape.kv_heads);
    return kHeaderBytes + heads * (static_cast<size_t>(m.n_blocks) * sizeof(uint16_t) + packed_bytes(m));
}

void pack(const uint8_t* codes, int n, int bits, uint8_t* out) {
    uint32_t held = 0;
    int n_held = 0;
    for (int i = 0; i < n; ++i) {
        held |= static_cast<uint32_t>(codes[i]) << n_held;
        for (n_held += bits; n_held >= 8; n_held -= 8) {
            *out++ = static_cast<uint8_t>(held);
            held >>= 8;
        }
    }
    if (n_held > 0) {
        *out = static_cast<uint8_t>(held);
    }
}

void unpack(const uint8_t* in, int n, int bits, uint8_t* codes) {
    uint32_t held = 0;
    int n_held = 0;
    for (int i = 0; i < n; ++i) {
        if (n_held < bits) {
            held |= static_cast<uint32_t>(*in++) << n_held;
            n_held += 8;
        }
        codes[i] = static_cast<uint8_t>(held & ((1U << bits) - 1U));
        held >>= bits;
        n_held -= bits;
    }
}

size_t native_bytes(const Store::Impl& m) {
    const auto elements = static_cast<size_t>(m.shape.row_elements());
    return std::max(elements * sizeof(uint16_t), coded_row_bytes(m));
}

// Bytes of a piece; 0: rows have no room for any.
size_t piece_bytes(const Store::Impl& m) {
    const size_t room = native_bytes(m) - coded_row_bytes(m);
    return room < kPieceHeaderBytes + kLeastPiece ? 0 : room - kPieceHeaderBytes;
}

void put_piece(const Store::Impl& m, int64_t row, uint8_t* out) {
    const std::vector<uint8_t>& record = m.conditioner.record();
    const size_t size = piece_bytes(m);
    const size_t count = size == 0 ? 0 : (record.size() + size - 1) / size;
    if (count == 0 || count > 0xffff) {
        return;
    }
    const size_t index = static_cast<size_t>(row) % count; // neighbours bring all of it together
    put_at(out, index, 2);
    put_at(out + 2, count, 2);
    const size_t begin = index * size;
    std::memcpy(out + kPieceHeaderBytes, record.data() + begin, std::min(size, record.size() - begin));
}

void put_coded_row(const Store::Impl& m, int64_t row, uint8_t* out) {
    Header header;
    header.side = static_cast<uint8_t>(m.shape.side);
    header.bits = static_cast<uint8_t>(m.options.bits);
    header.head_size = static_cast<uint16_t>(m.shape.head_size);
    header.kv_heads = static_cast<uint16_t>(m.shape.kv_heads);
    header.conditioning_id = m.conditioner.id();
    header.block = static_cast<uint16_t>(m.row_block(row));
    put_header(header, out);
    uint8_t* at = out + kHeaderBytes;
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        const uint16_t* const scales = m.tile_scales(head, row / kTileRows) + row % kTileRows;
        for (int b = 0; b < m.n_blocks; ++b, at += 2) {
            put_at(at, scales[b * kTileRows], 2);
        }
    }
    uint8_t codes[kMaxHeadSize];
    for (int head = 0; head < m.shape.kv_heads; ++head, at += packed_bytes(m)) {
        gather_codes(m, row, head, codes);
        pack(codes, m.shape.head_size, m.options.bits, at);
    }
    put_piece(m, row, out + coded_row_bytes(m));
    header.checksum = row_checksum(out, native_bytes(m));
    put_header(header, out);
}

Status check_coded_row(const Store::Impl& m, const uint8_t* in) {
    const Header h = get_header(in);
    const std::string what = "native row: ";
    if (h.version != kVersion) {
        return {StatusCode::unsupported, what + "format version " + std::to_string(h.version) +
                                             ", this library reads " + std::to_string(kVersion) +
                                             "; save the cache again"};
    }
    if (h.side != static_cast<uint8_t>(m.shape.side) || h.bits != m.options.bits || h.head_size != m.shape.head_size ||
        h.kv_heads != m.shape.kv_heads) {
        const auto words = [](int side, int bits, int head_size, int heads) {
            return std::string(side == 0 ? "keys" : "values") + ", " + std::to_string(bits) + " bits, head size " +
                   std::to_string(head_size) + ", " + std::to_string(heads) + " heads";
        };
        return invalid(what + "it holds (" + words(h.side, h.bits, h.head_size, h.kv_heads) + "), the store (" +
                       words(static_cast<int>(m.shape.side), m.options.bits, m.shape.head_size, m.shape.kv_heads) +
                       "); restore with the settings it was saved with");
    }
    if (h.conditioning_id != m.conditioner.id()) {
        return invalid(what + "made with conditioning " + std::to_string(h.conditioning_id) + ", the store has " +
                       std::to_string(m.conditioner.id()) + "; restore with the profile it was saved with");
    }
    bool damaged = h.reserved != 0 || h.reserved_too != 0 || h.checksum != row_checksum(in, native_bytes(m));
    const uint8_t* const scales = in + kHeaderBytes;
    for (int i = 0; i < m.shape.kv_heads * m.n_blocks && !damaged; ++i) {
        damaged = get_at(scales + 2 * i, 2) >= 0x7c00U; // negative, infinite or NaN: never written
    }
    return damaged ? invalid(what + "damaged (checksum); restore from an intact copy") : Status();
}

void take_coded_row(Store::Impl& m, int64_t row, const uint8_t* in) {
    set_entry(m, row, find_entry(m, get_header(in).block));
    const uint8_t* at = in + kHeaderBytes;
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        uint16_t* const scales = m.tile_scales(head, row / kTileRows) + row % kTileRows;
        for (int b = 0; b < m.n_blocks; ++b, at += 2) {
            scales[b * kTileRows] = static_cast<uint16_t>(get_at(at, 2));
        }
    }
    uint8_t codes[kMaxHeadSize + 32];
    std::fill(codes + m.shape.head_size, codes + round_up(m.shape.head_size, 32), uint8_t{0});
    for (int head = 0; head < m.shape.kv_heads; ++head, at += packed_bytes(m)) {
        unpack(at, m.shape.head_size, m.options.bits, codes);
        scatter_codes(m, row, head, codes);
    }
}

void clear_row(Store::Impl& m, int64_t row) {
    if (!m.is_written(row)) {
        return;
    }
    const uint8_t codes[kMaxHeadSize + 32] = {};
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        if (!m.coded()) {
            std::memset(m.plain_row(head, row), 0,
                        static_cast<size_t>(m.shape.head_size) * static_cast<size_t>(m.options.bits / 8));
            continue;
        }
        uint16_t* const scales = m.tile_scales(head, row / kTileRows) + row % kTileRows;
        for (int b = 0; b < m.n_blocks; ++b) {
            scales[b * kTileRows] = 0;
        }
        scatter_codes(m, row, head, codes);
    }
    set_bit(m.written_rows, row, false);
}

// The full age whose low bits a tag holds: the one nearest to the clock.
uint64_t full_age(uint64_t clock, uint64_t low) {
    constexpr uint64_t kPeriod = uint64_t{1} << kTagAgeBits;
    uint64_t age = (clock & ~(kPeriod - 1)) | low;
    if (age > clock + kPeriod / 2 && age >= kPeriod) {
        age -= kPeriod;
    } else if (age + kPeriod / 2 < clock) {
        age += kPeriod;
    }
    return age;
}

// A slot for a row that comes with an age; -1: it stays as codes.
int slot_for(Store::Impl& m, uint64_t age, bool pinned) {
    if (pinned) {
        if (m.n_pinned == m.options.sink_slots) {
            release_slot(m, longest_pinned_slot(m));
        }
        return free_slot(m);
    }
    if (m.ring_rows == 0) {
        return -1;
    }
    if (m.n_ring < m.ring_rows) {
        return free_slot(m);
    }
    const int oldest = oldest_ring_slot(m);
    if (m.slot_age[static_cast<size_t>(oldest)] >= age) {
        return -1;
    }
    release_slot(m, oldest);
    return oldest;
}

// `values` without the tag.
void take_exact_row(Store::Impl& m, int64_t row, const uint16_t* values, uint64_t age, bool pinned, int block) {
    set_entry(m, row, find_entry(m, block));
    pinned = pinned && m.options.sink_slots > 0;
    const int slot = slot_for(m, age, pinned);
    if (slot >= 0) {
        take_slot(m, slot, row, age, pinned);
        std::memcpy(m.raw(slot), values, static_cast<size_t>(m.shape.row_elements()) * sizeof(uint16_t));
    }
    m.clock = std::max(m.clock, age);
    HeadNotes notes;
    alignas(64) uint16_t h[kMaxHeadSize + 2 * kVectorPadding] = {};
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        std::copy_n(values + static_cast<ptrdiff_t>(head) * m.shape.head_size, m.shape.head_size, h);
        encode_head(m, row, head, h, notes);
    }
    m.counters.saturated += notes.saturated;
}

} // namespace

size_t Store::native_row_bytes() const {
    const Impl& m = *impl_;
    return m.coded() ? native_bytes(m)
                     : static_cast<size_t>(m.shape.row_elements()) * static_cast<size_t>(m.options.bits / 8);
}

bool Store::native_piece(const uint8_t* in, NativePiece& out) const {
    const Impl& m = *impl_;
    out = {};
    if (!m.coded() || get_at(in, 4) != kMagic) {
        return false;
    }
    const Header h = get_header(in);
    if (h.version != kVersion || h.bits != m.options.bits || h.head_size != m.shape.head_size ||
        h.kv_heads != m.shape.kv_heads || h.checksum != row_checksum(in, native_bytes(m))) {
        return false;
    }
    out.conditioning_id = h.conditioning_id;
    out.block = h.block;
    const uint8_t* const piece = in + coded_row_bytes(m);
    const size_t size = piece_bytes(m);
    if (h.conditioning_id != 0 && size != 0 && get_at(piece, 2) < get_at(piece + 2, 2)) {
        out.index = static_cast<int>(get_at(piece, 2));
        out.count = static_cast<int>(get_at(piece + 2, 2));
        out.data = piece + kPieceHeaderBytes;
        out.size = size;
    }
    return true;
}

void Store::read_native(int64_t row, uint8_t* out) const {
    const Impl& m = *impl_;
    std::memset(out, 0, native_row_bytes());
    if (!is_written(row)) {
        return;
    }
    if (!m.coded()) {
        const size_t head_bytes = static_cast<size_t>(m.shape.head_size) * static_cast<size_t>(m.options.bits / 8);
        for (int head = 0; head < m.shape.kv_heads; ++head) {
            std::memcpy(out + static_cast<size_t>(head) * head_bytes, m.plain_row(head, row), head_bytes);
        }
    } else if (const int slot = m.find_slot(row); slot >= 0) {
        const auto s = static_cast<size_t>(slot);
        const auto elements = static_cast<size_t>(m.shape.row_elements());
        uint16_t first[kTagElements]; // `out` may not be aligned
        std::memcpy(out, m.raw(slot), elements * sizeof(uint16_t));
        std::copy_n(m.raw(slot), kTagElements, first);
        put_tag(first, 0, kTagElements, make_tag({m.slot_age[s], m.slot_pinned[s] != 0, m.row_block(row)}));
        std::memcpy(out, first, sizeof first);
    } else {
        put_coded_row(m, row, out);
    }
}

int64_t Store::restored_age_shift(const uint8_t* rows, size_t stride, int64_t n) const {
    const Impl& m = *impl_;
    if (!m.coded() || m.n_slots == 0) {
        return 0;
    }
    bool any = false;
    uint64_t oldest = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint16_t first[kTagElements];
        std::memcpy(first, rows + static_cast<size_t>(i) * stride, sizeof first);
        Tag tag;
        bool damaged = false;
        if (read_tag(first, tag, damaged) && !damaged && !tag.pinned) {
            const uint64_t age = full_age(m.clock, tag.age);
            oldest = any ? std::min(oldest, age) : age;
            any = true;
        }
    }
    return any && oldest <= m.clock ? static_cast<int64_t>(m.clock + 1 - oldest) : 0;
}

Status Store::write_native(int64_t row, const uint8_t* in, bool& not_native, int64_t age_shift) {
    Impl& m = *impl_;
    not_native = false;
    if (!m.in_range(row)) {
        return invalid("native row: row " + std::to_string(row) + " is not in 0.." + std::to_string(m.shape.rows - 1));
    }
    const auto release = [&m, row] {
        if (const int slot = m.find_slot(row); slot >= 0) {
            release_slot(m, slot);
        }
    };
    if (std::all_of(in, in + native_row_bytes(), [](uint8_t byte) { return byte == 0; })) {
        release();
        clear_row(m, row);
        return {};
    }
    if (!m.coded()) {
        const size_t head_bytes = static_cast<size_t>(m.shape.head_size) * static_cast<size_t>(m.options.bits / 8);
        for (int head = 0; head < m.shape.kv_heads; ++head) {
            std::memcpy(m.plain_row(head, row), in + static_cast<size_t>(head) * head_bytes, head_bytes);
        }
        set_bit(m.written_rows, row, true);
        return {};
    }
    if (get_at(in, 4) == kMagic) {
        if (Status status = check_coded_row(m, in); !status.ok()) {
            return status;
        }
        release();
        take_coded_row(m, row, in);
        set_bit(m.written_rows, row, true);
        return {};
    }
    const auto elements = static_cast<size_t>(m.shape.row_elements());
    Tag tag;
    bool damaged = false;
    std::vector<uint16_t> values(elements); // `in` may not be aligned
    std::memcpy(values.data(), in, elements * sizeof(uint16_t));
    if (elements < kTagElements || !read_tag(values.data(), tag, damaged)) {
        not_native = true;
        return {};
    }
    if (damaged || std::any_of(values.begin(), values.end(), [](uint16_t h) { return (h & 0x7c00U) == 0x7c00U; })) {
        return invalid("native row: damaged (exact row, " + std::string(damaged ? "tag checksum" : "value not finite") +
                       "); restore from an intact copy");
    }
    release();
    std::for_each_n(values.begin(), kTagElements, [](uint16_t& h) { h &= 0xfffeU; });
    take_exact_row(m, row, values.data(), full_age(m.clock, tag.age) + static_cast<uint64_t>(age_shift), tag.pinned,
                   tag.block);
    set_bit(m.written_rows, row, true);
    return {};
}

} // namespace turboquant
