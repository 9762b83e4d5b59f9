// attend_reference(): the definition of attention over a store, written to be obviously right. Nothing of the fast
// path is used: codes are found through field_position(), rows decoded one by one, sums taken in double precision.
#include "attention/plan.h"

#include <cmath>
#include <limits>
#include <vector>

namespace turboquant {
namespace {

using Rows = std::vector<std::vector<double>>;

// A row of one head as its codes (or its pass-through row) have it, conditioning undone.
std::vector<double> decode_row(const Store::Impl& s, int kv_head, int64_t row) {
    const int d = s.shape.head_size;
    std::vector<double> x(static_cast<size_t>(d));
    const size_t tile = static_cast<size_t>(kv_head * s.n_tiles + row / kTileRows);
    const int r = static_cast<int>(row % kTileRows);
    if (s.book == nullptr) {
        for (int c = 0; c < d; ++c) {
            const size_t at =
                (tile * kTileRows + static_cast<size_t>(r)) * static_cast<size_t>(d) + static_cast<size_t>(c);
            x[static_cast<size_t>(c)] = s.options.bits == 32
                                            ? reinterpret_cast<const float*>(s.plain.data())[at]
                                            : from_half(reinterpret_cast<const uint16_t*>(s.plain.data())[at]);
        }
        return x;
    }
    std::vector<float> y(static_cast<size_t>(d));
    const uint8_t* codes = s.tile_codes(kv_head, row / kTileRows);
    const uint16_t* scales = s.tile_scales(kv_head, row / kTileRows);
    for (size_t b = 0; b < s.rotation.blocks().size(); ++b) {
        const RotationBlock& block = s.rotation.blocks()[b];
        const float scale = from_half(scales[b * kTileRows + static_cast<size_t>(r)]);
        for (int c = block.offset; c < block.offset + block.size; ++c) {
            int code = 0;
            for (int p = 0; p < s.tile.n_planes; ++p) {
                const Plane& plane = s.tile.planes[p];
                const FieldPosition at = field_position(s.shape.side, plane, r, c);
                code |= (codes[plane.offset + at.byte] >> at.bit & ((1 << plane.width) - 1)) << plane.shift;
            }
            y[static_cast<size_t>(c)] = scale * static_cast<float>(s.book->value(code));
        }
    }
    s.rotation.inverse(y.data(), y.data());
    const Conditioning& conditioning = s.conditioner.conditioning();
    std::vector<float> mean(static_cast<size_t>(s.shape.row_elements()));
    block_mean(conditioning, d, s.shape.kv_heads, s.row_block(row), mean.data());
    for (int c = 0; c < d; ++c) {
        const size_t i = static_cast<size_t>(kv_head) * static_cast<size_t>(d) + static_cast<size_t>(c);
        x[static_cast<size_t>(c)] = static_cast<double>(y[static_cast<size_t>(c)]) /
                                        (conditioning.lambda.empty() ? 1.0f : conditioning.lambda[i]) +
                                    mean[i];
    }
    return x;
}

// The fp16 values of the row (all heads) where it is exact for the query, else null: attention.h says when.
const uint16_t* find_exact(const Store& store, const Staging* staging, const AttentionCall& call, Side role,
                           int64_t query, int64_t row) {
    const Store::Impl& s = store.impl();
    for (int64_t i = 0; i < call.n_given; ++i) {
        const GivenRow& given = call.given[i];
        const int64_t end = call.ranges[query].end;
        if (given.row == row && (row < call.given_sinks || (row < end && row >= end - call.given_window))) {
            return role == Side::key ? given.key : given.value;
        }
    }
    const bool staged = staging != nullptr && staging->owner == &store && staging->batch_begin < staging->size() &&
                        staging->age.back() == s.clock;
    const uint16_t* raw = nullptr;
    uint64_t age = 0;
    bool pinned = false;
    if (staged && (s.written_rows[static_cast<size_t>(row / 64)] >> (row % 64) & 1) != 0) {
        for (int64_t e = 0; e < staging->size(); ++e) {
            const size_t i = static_cast<size_t>(e);
            if (staging->row[i] == row && staging->age[i] >= age) {
                age = staging->age[i];
                raw = staging->raw.data() + i * static_cast<size_t>(s.shape.row_elements());
            }
        }
    }
    for (int slot = 0; slot < s.n_slots; ++slot) {
        const size_t i = static_cast<size_t>(slot);
        if (s.slot_row[i] == row && s.slot_age[i] >= age) {
            age = s.slot_age[i];
            raw = s.raw(slot);
            pinned = s.slot_pinned[i] != 0;
        }
    }
    if (raw == nullptr || !staged || pinned) {
        return raw;
    }
    const uint64_t query_age = staging->age[static_cast<size_t>(staging->batch_begin + call.staging_offset + query)];
    const uint64_t window = static_cast<uint64_t>(s.ring_rows);
    return age <= query_age && age + window > query_age ? raw : nullptr;
}

std::vector<double> plain_row(const uint16_t* raw, int kv_head, int head_size) {
    std::vector<double> x(static_cast<size_t>(head_size));
    for (int c = 0; c < head_size; ++c) {
        x[static_cast<size_t>(c)] = from_half(raw[kv_head * head_size + c]);
    }
    return x;
}

Rows decode_rows(const Store::Impl& s, int kv_head, const AttentionCall& call) {
    Rows rows;
    for (int64_t r = 0; r < call.n_rows; ++r) {
        const int64_t tile = call.tiles != nullptr ? call.tiles[r / kTileRows] : r / kTileRows;
        rows.push_back(decode_row(s, kv_head, tile * kTileRows + r % kTileRows));
    }
    return rows;
}

Status check_staging(const Store& store, const Staging* staging, const AttentionCall& call, Side role) {
    attention::ExactRows rows;
    return rows.collect(store, staging, call, role);
}

// One query head over all rows; keys and values as this query sees them.
void attend_one(const Rows& keys, const Rows& values, const AttentionCall& call, int64_t query, int head,
                int value_size) {
    const float* q = call.q + query * call.q_query_stride + head * call.q_head_stride;
    float* out = call.out + query * call.out_query_stride + head * call.out_head_stride;
    const double infinity = std::numeric_limits<double>::infinity();
    const double slope = attention::alibi_slope(head, call.n_heads, call.max_bias);
    std::vector<double> score(keys.size());
    double top = -infinity;
    for (size_t r = 0; r < keys.size(); ++r) {
        double s = 0;
        for (size_t c = 0; c < keys[r].size(); ++c) {
            s += static_cast<double>(q[c]) * keys[r][c];
        }
        s *= call.scale;
        if (call.softcap > 0) {
            s = call.softcap * std::tanh(s / call.softcap);
        }
        if (call.mask != nullptr) {
            s += slope * from_half(call.mask[query * call.mask_query_stride + static_cast<int64_t>(r)]);
        }
        if (call.ranges != nullptr &&
            (static_cast<int64_t>(r) < call.ranges[query].begin || static_cast<int64_t>(r) >= call.ranges[query].end)) {
            s = -infinity;
        }
        score[r] = s;
        top = std::max(top, s);
    }
    std::vector<double> sum_values(static_cast<size_t>(value_size));
    double sum = 0;
    if (top > -infinity) {
        if (call.sink_logits != nullptr) {
            top = std::max(top, static_cast<double>(call.sink_logits[head]));
            sum += std::exp(call.sink_logits[head] - top);
        }
        for (size_t r = 0; r < keys.size(); ++r) {
            const double p = std::exp(score[r] - top);
            sum += p;
            for (size_t c = 0; p > 0 && c < sum_values.size(); ++c) {
                sum_values[c] += p * values[r][c];
            }
        }
    }
    for (int c = 0; c < value_size; ++c) {
        out[c] = sum == 0 ? 0.0f : static_cast<float>(sum_values[static_cast<size_t>(c)] / sum);
    }
}

} // namespace

Status attend_reference(const Store& k, const Store& v, const AttentionCall& call) {
    if (Status s = attention::check_call(k, v, call); !s.ok()) {
        return s;
    }
    if (Status s = check_staging(k, call.k_staging, call, Side::key); !s.ok()) {
        return s;
    }
    if (Status s = check_staging(v, call.v_staging, call, Side::value); !s.ok()) {
        return s;
    }
    const int group = call.n_heads / k.shape().kv_heads;
    const int value_size = call.value_size > 0 ? call.value_size : v.shape().head_size;
    for (int kv_head = 0; kv_head < k.shape().kv_heads; ++kv_head) {
        const Rows coded_keys = decode_rows(k.impl(), kv_head, call);
        const Rows coded_values = decode_rows(v.impl(), kv_head, call);
        for (int64_t i = 0; i < call.n_queries; ++i) {
            Rows keys = coded_keys;
            Rows values = coded_values;
            for (int64_t r = 0; r < call.n_rows; ++r) {
                if (const uint16_t* raw = find_exact(k, call.k_staging, call, Side::key, i, r)) {
                    keys[static_cast<size_t>(r)] = plain_row(raw, kv_head, k.shape().head_size);
                }
                if (const uint16_t* raw = find_exact(v, call.v_staging, call, Side::value, i, r)) {
                    values[static_cast<size_t>(r)] = plain_row(raw, kv_head, v.shape().head_size);
                }
            }
            for (int g = 0; g < group; ++g) {
                attend_one(keys, values, call, i, kv_head * group + g, value_size);
            }
        }
    }
    return {};
}

} // namespace turboquant
