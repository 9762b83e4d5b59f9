#include "host.h"
#include "kv_buffer.h"

#include <algorithm>
#include <cstring>

namespace turboquant::plugin {
namespace {

constexpr int kMostCodeBits = 8; // above, rows are stored as they are

StoreShape shape_of(Side side, int elements, int64_t cells, int head_size) {
    return {.side = side, .head_size = head_size, .kv_heads = elements / head_size, .rows = cells};
}

StoreOptions options_of(Side side, const Config& config, int64_t streams) {
    // With a stream for each sequence only one sequence's first rows need room.
    const int sequences = streams > 1 ? 1 : config.sequences;
    return {.bits = side == Side::key ? config.key_bits : config.value_bits,
            .window = config.window,
            .sink_slots = config.sinks * sequences,
            .emulate_q4_0 = config.emulate_q4_0};
}

} // namespace

KvTensor::KvTensor(const ggml_tensor& tensor, Side side, int layer, const Config& config, const LayerProfile* profile)
    : name_(tensor.name),
      side_(side),
      layer_(layer),
      config_(config),
      elements_(static_cast<int>(tensor.ne[0])),
      cells_(tensor.ne[1]),
      streams_(tensor.ne[2]),
      type_(tensor.type),
      row_bytes_(ggml_row_size(tensor.type, tensor.ne[0])) {
    if (side == Side::key && (config.key_bits <= kMostCodeBits || config.emulate_q4_0) && elements_ > 0) {
        source_ = KeySource(profile, config.calibrate);
        profile_head_size_ = profile == nullptr ? 0 : profile->head_size;
    }
}

Status KvTensor::reserve_bytes(const ggml_tensor& tensor, Side side, const Config& config, size_t& bytes) {
    const int elements = static_cast<int>(tensor.ne[0]);
    const int hint = side == Side::key ? config.key_head_size : config.value_head_size;
    bytes = 0;
    if (elements == 0) {
        return {}; // a layer without attention in a model that has it elsewhere
    }
    auto consider = [&](int head_size) -> Status {
        size_t one = 0;
        Status status = Store::bytes(shape_of(side, elements, tensor.ne[1], head_size),
                                     options_of(side, config, tensor.ne[2]), one);
        bytes = std::max(bytes, one * static_cast<size_t>(tensor.ne[2]));
        return status;
    };
    if (hint > 0 && elements % hint == 0) {
        return consider(hint);
    }
    // Smaller heads need more scales: the smallest head that models have decides, but for the padding of odd sizes.
    constexpr int kSmallest = 64;
    constexpr int kLargest = 1024;
    Status status;
    for (int head_size = std::min(kSmallest, elements); head_size <= std::min(kLargest, elements); ++head_size) {
        if (elements % head_size == 0 && head_size % 4 == 0) {
            status = consider(head_size);
            if (!status.ok()) {
                return status;
            }
        }
    }
    return bytes > 0
               ? Status{}
               : invalid("a row of " + std::to_string(elements) + " elements fits no head size that TurboQuant serves");
}

Status KvTensor::set_head_size(int head_size) {
    if (head_size == head_size_) {
        return {};
    }
    if (head_size_ != 0 || head_size <= 0 || elements_ % head_size != 0) {
        return invalid(name_ + " is read with head size " + std::to_string(head_size) + " but holds rows of " +
                       std::to_string(elements_) +
                       (head_size_ != 0 ? " that were written with head size " + std::to_string(head_size_) : ""));
    }
    const int hint = side_ == Side::key ? config_.key_head_size : config_.value_head_size;
    if (hint > 0 && hint != head_size && elements_ % hint == 0) {
        log_warning("TURBOQUANT_HEAD_SIZE says " + std::to_string(hint) + " but " + name_ + " has heads of " +
                    std::to_string(head_size) + ": the reported KV size is not exact");
    }
    if (profile_head_size_ != 0 && profile_head_size_ != head_size) {
        return invalid("layer " + std::to_string(layer_) + " of the profile '" + config_.profile + "' has " +
                       std::to_string(elements_ / profile_head_size_) + " KV heads of " +
                       std::to_string(profile_head_size_) + ", the model has " + std::to_string(elements_ / head_size) +
                       " of " + std::to_string(head_size) +
                       ": the profile is of another model; run `tq tune` for this one");
    }
    Stores stores(static_cast<size_t>(streams_));
    for (auto& store : stores) {
        StoreOptions options = options_of(side_, config_, streams_);
        options.calibration_rows = source_.calibration_rows();
        Status status = Store::create(shape_of(side_, elements_, cells_, head_size), options, source_.initial(), store);
        if (!status.ok()) {
            return {status.code(), name_ + ": " + status.message()};
        }
        if (store->native_row_bytes() > row_bytes_) {
            return {StatusCode::unsupported,
                    name_ + ": rows of " + std::to_string(elements_) +
                        " elements are too short to be saved compressed: run this model without the "
                        "TurboQuant device (--device none)"};
        }
    }
    stores_ = std::move(stores);
    head_size_ = head_size;
    return {};
}

void KvTensor::read_row(int64_t row, uint8_t* out) const {
    std::memset(out, 0, row_bytes_);
    if (!stores_.empty()) {
        stores_[static_cast<size_t>(row / cells_)]->read_native(row % cells_, out);
    }
}

Status KvTensor::write_row(int64_t row, const uint8_t* data, int64_t age_shift) {
    pending_.erase(row);
    if (stores_.empty()) {
        // Before the first graph nothing can have been stored; zeros are what is there.
        const bool zero = std::all_of(data, data + row_bytes_, [](uint8_t byte) { return byte == 0; });
        return zero ? Status{} : invalid(name_ + ": rows arrive before the head size is known");
    }
    Store& store = *stores_[static_cast<size_t>(row / cells_)];
    const int64_t cell = row % cells_;
    Store::NativePiece piece;
    if (side_ == Side::key && store.native_piece(data, piece) && piece.conditioning_id != store.conditioning_id()) {
        return write_foreign_row(row, data, age_shift, piece);
    }
    bool not_native = false;
    if (Status status = store.write_native(cell, data, not_native, age_shift); !status.ok() || !not_native) {
        return status;
    }
    std::vector<float> values(static_cast<size_t>(elements_));
    ggml_get_type_traits(type_)->to_float(data, values.data(), elements_);
    return store.write(values.data(), elements_, &cell, 1, ParallelFor{}, nullptr);
}

void KvTensor::mark_written(int64_t row) {
    damaged_.erase(row);
    pending_.erase(row);
}

// A store of one row like this tensor's, without exact rows.
Status KvTensor::one_row_store(const Conditioning& conditioning, std::unique_ptr<Store>& out) const {
    StoreOptions options;
    options.bits = config_.key_bits;
    return Store::create(shape_of(side_, elements_, 1, head_size_), options, conditioning, out);
}

// From codes made with another conditioning to codes made with this tensor's.
Status KvTensor::translate(int64_t row, const uint8_t* data, int64_t age_shift, int block, Foreign& foreign) {
    Store& store = *stores_[static_cast<size_t>(row / cells_)];
    if (foreign.reader == nullptr) {
        if (Status status = one_row_store(foreign.conditioning, foreign.reader); !status.ok()) {
            return status;
        }
    }
    if (writer_ == nullptr || writer_->conditioning_id() != store.conditioning_id()) {
        if (Status status = one_row_store(store.conditioning(), writer_); !status.ok()) {
            return status;
        }
    }
    bool not_native = false;
    if (Status status = foreign.reader->write_native(0, data, not_native); !status.ok()) {
        return status;
    }
    std::vector<float> values(static_cast<size_t>(elements_));
    const int64_t first = 0;
    const int32_t position = block * kPositionBlock + kPositionBlock / 2;
    Status status = foreign.reader->read(0, values.data());
    if (status.ok()) {
        status = writer_->write(values.data(), elements_, &first, 1, ParallelFor{}, nullptr, &position);
    }
    std::vector<uint8_t> bytes(row_bytes_);
    writer_->read_native(0, bytes.data());
    return status.ok() ? store.write_native(row % cells_, bytes.data(), not_native, age_shift) : status;
}

Status KvTensor::collect_piece(const Store::NativePiece& piece, Foreign& foreign) {
    if (piece.count == 0) {
        return {};
    }
    if (foreign.pieces.empty()) {
        foreign.pieces.resize(static_cast<size_t>(piece.count));
    }
    const auto index = static_cast<size_t>(piece.index);
    if (foreign.pieces.size() != static_cast<size_t>(piece.count) || index >= foreign.pieces.size()) {
        return invalid("rows disagree about what they were made with; save the cache again");
    }
    foreign.pieces[index].assign(piece.data, piece.data + piece.size);
    if (std::any_of(foreign.pieces.begin(), foreign.pieces.end(), [](const auto& p) { return p.empty(); })) {
        return {};
    }
    std::vector<uint8_t> record;
    for (const auto& part : foreign.pieces) {
        record.insert(record.end(), part.begin(), part.end());
    }
    const int kv_heads = elements_ / head_size_;
    Status status = read_conditioning(record.data(), record.size(), head_size_, kv_heads, foreign.conditioning);
    if (status.ok() && conditioning_id(foreign.conditioning, head_size_, kv_heads) != piece.conditioning_id) {
        status = invalid("rows are not of the conditioning that they bring; save the cache again");
    }
    foreign.complete = status.ok();
    if (!status.ok()) {
        foreign.pieces.clear();
    }
    return status;
}

Status KvTensor::write_foreign_row(int64_t row, const uint8_t* data, int64_t age_shift,
                                   const Store::NativePiece& piece) {
    constexpr size_t kMostForeign = 16; // no honest host restores rows of that many caches at once
    if (foreign_.size() >= kMostForeign && !foreign_.contains(piece.conditioning_id)) {
        std::erase_if(foreign_, [](const auto& entry) { return entry.second.complete; });
    }
    Foreign& foreign = foreign_[piece.conditioning_id];
    if (piece.conditioning_id == 0) {
        foreign.complete = true; // codes of the keys as they are
    }
    if (!foreign.complete) {
        pending_[row] = {piece.conditioning_id, age_shift, std::vector<uint8_t>(data, data + row_bytes_)};
        damaged_.insert(row);
        Status status = collect_piece(piece, foreign);
        if (!status.ok() || !foreign.complete) {
            return status.ok() ? status : Status{status.code(), name_ + ": " + status.message()};
        }
        foreign.pieces.clear();
        if (source_.state() == KeySource::State::waiting) {
            status = source_.adopt(foreign.conditioning, stores_);
            if (status.ok() && rope_.known) {
                status = source_.see_turns(rope_, stores_, ParallelFor{});
            }
            if (!status.ok()) {
                return status;
            }
        }
        for (auto at = pending_.begin(); at != pending_.end();) {
            if (at->second.id != piece.conditioning_id) {
                ++at;
                continue;
            }
            const PendingRow pending = std::move(at->second);
            const int64_t pending_row = at->first;
            at = pending_.erase(at);
            Status written = write_row(pending_row, pending.bytes.data(), pending.age_shift);
            if (written.ok()) {
                damaged_.erase(pending_row);
            } else {
                status = written;
            }
        }
        return status;
    }
    return translate(row, data, age_shift, piece.block, foreign);
}

Status KvTensor::read_bytes(size_t offset, size_t size, uint8_t* out) {
    std::vector<uint8_t> row_data(row_bytes_);
    while (size > 0) {
        const int64_t row = static_cast<int64_t>(offset / row_bytes_);
        const size_t begin = offset % row_bytes_;
        const size_t count = std::min(size, row_bytes_ - begin);
        if (row >= cells_ * streams_) {
            return invalid(name_ + ": the host reads past the end");
        }
        if (count == row_bytes_) {
            read_row(row, out);
        } else {
            read_row(row, row_data.data());
            std::memcpy(out, row_data.data() + begin, count);
        }
        offset += count;
        out += count;
        size -= count;
    }
    return {};
}

Status KvTensor::write_bytes(size_t offset, size_t size, const uint8_t* data) {
    Status first_error;
    // Rows that come together are one sequence's: younger than all that is there, whatever the host removed meanwhile.
    const size_t until_row = (row_bytes_ - offset % row_bytes_) % row_bytes_;
    int64_t age_shift = 0;
    if (!stores_.empty() && size >= until_row + row_bytes_ &&
        offset / row_bytes_ < static_cast<size_t>(cells_ * streams_)) {
        const Store& store = *stores_[offset / row_bytes_ / static_cast<size_t>(cells_)];
        age_shift = store.restored_age_shift(data + until_row, row_bytes_,
                                             static_cast<int64_t>((size - until_row) / row_bytes_));
    }
    while (size > 0) {
        const int64_t row = static_cast<int64_t>(offset / row_bytes_);
        const size_t begin = offset % row_bytes_;
        const size_t count = std::min(size, row_bytes_ - begin);
        if (row >= cells_ * streams_) {
            return invalid(name_ + ": the host writes past the end");
        }
        Status status;
        if (count == row_bytes_) {
            partial_.erase(row);
            damaged_.erase(row);
            status = write_row(row, data, age_shift);
        } else {
            PartialRow& partial = partial_[row];
            partial.bytes.resize(row_bytes_);
            std::memcpy(partial.bytes.data() + begin, data, count);
            partial.filled += count;
            if (partial.filled >= row_bytes_) {
                damaged_.erase(row);
                status = write_row(row, partial.bytes.data(), age_shift);
                partial_.erase(row);
            }
        }
        if (!status.ok()) {
            damaged_.insert(row);
            first_error = first_error.ok() ? status : first_error;
        }
        offset += count;
        data += count;
        size -= count;
    }
    return first_error;
}

Status KvTensor::zero_bytes(size_t offset, size_t size) {
    if (offset % row_bytes_ != 0 || size % row_bytes_ != 0) {
        return invalid(name_ + ": the host clears part of a row");
    }
    if (offset == 0 && size == row_bytes_ * static_cast<size_t>(cells_ * streams_)) {
        clear();
        return {};
    }
    const std::vector<uint8_t> zeros(row_bytes_);
    for (size_t at = offset; at < offset + size; at += row_bytes_) {
        if (Status status = write_bytes(at, row_bytes_, zeros.data()); !status.ok()) {
            return status;
        }
    }
    return {};
}

Status KvTensor::copy_stream(KvTensor& source, int64_t from, int64_t to) {
    if (source.stores_.empty() && stores_.empty()) {
        return {};
    }
    if (source.stores_.empty() || stores_.empty()) {
        return invalid(name_ + ": copied to or from a cache that no graph has used yet");
    }
    Status status = stores_[static_cast<size_t>(to)]->copy_from(*source.stores_[static_cast<size_t>(from)]);
    if (status.ok()) {
        damaged_.erase(damaged_.lower_bound(to * cells_), damaged_.lower_bound((to + 1) * cells_));
        pending_.erase(pending_.lower_bound(to * cells_), pending_.lower_bound((to + 1) * cells_));
        std::set<int64_t> copied;
        for (const int64_t row : source.damaged_) {
            if (row / source.cells_ == from) {
                copied.insert(to * cells_ + row % source.cells_);
            }
        }
        damaged_.merge(copied);
        std::map<int64_t, PendingRow> waiting;
        for (auto at = source.pending_.lower_bound(from * cells_);
             &source == this && at != pending_.end() && at->first < (from + 1) * cells_; ++at) {
            waiting[to * cells_ + at->first % cells_] = at->second;
        }
        pending_.merge(waiting);
    }
    return status;
}

void KvTensor::clear() {
    for (auto& store : stores_) {
        store->clear();
    }
    partial_.clear();
    damaged_.clear();
    pending_.clear();
    foreign_.clear();
}

} // namespace turboquant::plugin
