// The buffer type that owns the KV cache. The host asks the device's default type for every kind of buffer; those that
// hold `cache_k_l<N>` and `cache_v_l<N>` tensors become compressed stores, all others plain host memory.
//
// To the host a compressed tensor looks like [elements, cells, streams] of its own type at an address that is never
// read; all access goes through the functions here. Its bytes are opaque: a row read out is the store's native row,
// zero-padded to the host's row size; a row written may be that or a plain row of the host's type.
#pragma once

#include "abi.h"
#include "config.h"
#include "key_source.h"

#include "turboquant/store.h"

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace turboquant::plugin {

// One layer's K or V: a store per stream. Not thread-safe; the owner's mutex guards it.
class KvTensor {
public:
    // config: the layer's (Config::in_layer). profile: the layer's part, copied, or null.
    KvTensor(const ggml_tensor& tensor, Side side, int layer, const Config& config, const LayerProfile* profile);

    const std::string& name() const { return name_; }
    int layer() const { return layer_; } // N of cache_k_l<N>
    Side side() const { return side_; }
    const Config& config() const { return config_; }
    int64_t cells() const { return cells_; }
    int64_t streams() const { return streams_; }
    int elements() const { return elements_; }
    ggml_type type() const { return type_; }
    size_t row_bytes() const { return row_bytes_; }
    int head_size() const { return head_size_; } // 0 until known
    RopeFacts& rope() { return rope_; }          // of keys
    KeySource& key_source() { return source_; }  // of keys; of other tensors it does nothing
    Stores& stores() { return stores_; }

    // The host never says the head size when it allocates; its graph does. Creates the stores at the first call; a
    // later call with another size is an error.
    Status set_head_size(int head_size);
    // null while the head size is unknown.
    Store* store(int64_t stream) { return stores_.empty() ? nullptr : stores_[static_cast<size_t>(stream)].get(); }

    // Byte range of the tensor as the host sees it. Rows may be cut anywhere; a row written in pieces counts once all
    // its bytes have come.
    Status read_bytes(size_t offset, size_t size, uint8_t* out);
    Status write_bytes(size_t offset, size_t size, const uint8_t* data);
    Status zero_bytes(size_t offset, size_t size);
    // Rows (over all streams) whose last restoring failed: the host has no way to hear of it then, so attention refuses
    // to answer from them. A row leaves the set when it is written, restored or cleared.
    const std::set<int64_t>& damaged() const { return damaged_; }
    void mark_written(int64_t row);
    // A damaged row that only lacks the conditioning it was made with, as too few rows of its kind have come.
    bool is_pending(int64_t row) const { return pending_.contains(row); }
    // Stream `to` becomes what stream `from` of `source` is.
    Status copy_stream(KvTensor& source, int64_t from, int64_t to);
    void clear();

    // Bytes the stores of such a tensor take. Head size not known: the most that any plausible one needs.
    static Status reserve_bytes(const ggml_tensor& tensor, Side side, const Config& config, size_t& bytes);

private:
    struct PartialRow {
        std::vector<uint8_t> bytes;
        size_t filled = 0;
    };
    // Rows that were saved with a conditioning which is not this tensor's.
    struct Foreign {
        std::vector<std::vector<uint8_t>> pieces; // of its record
        bool complete = false;
        Conditioning conditioning;
        std::unique_ptr<Store> reader; // of one row
    };
    struct PendingRow {
        uint32_t id = 0;
        int64_t age_shift = 0;
        std::vector<uint8_t> bytes;
    };
    Status write_row(int64_t row, const uint8_t* data, int64_t age_shift);
    Status write_foreign_row(int64_t row, const uint8_t* data, int64_t age_shift, const Store::NativePiece& piece);
    Status collect_piece(const Store::NativePiece& piece, Foreign& foreign);
    Status translate(int64_t row, const uint8_t* data, int64_t age_shift, int block, Foreign& foreign);
    Status one_row_store(const Conditioning& conditioning, std::unique_ptr<Store>& out) const;
    void read_row(int64_t row, uint8_t* out) const;

    std::string name_;
    Side side_;
    int layer_;
    Config config_;
    RopeFacts rope_;
    int profile_head_size_ = 0; // 0: no profile
    int elements_;
    int64_t cells_;
    int64_t streams_;
    ggml_type type_;
    size_t row_bytes_;
    size_t reserved_ = 0;
    int head_size_ = 0;
    KeySource source_;
    Stores stores_;
    std::map<uint32_t, Foreign> foreign_; // by conditioning id
    std::map<int64_t, PendingRow> pending_;
    std::unique_ptr<Store> writer_; // of one row, with this tensor's conditioning
    std::map<int64_t, PartialRow> partial_;
    std::set<int64_t> damaged_;
};

// The context of a ggml buffer of the KV type. Contexts of one process may share it, hence the mutex; every access to a
// tensor of it holds the lock.
struct KvBuffer {
    std::mutex mutex;
    Config config;
    std::shared_ptr<const Profile> profile;
    std::vector<std::unique_ptr<KvTensor>> tensors;
    bool calibration_reported = false;
    bool profile_reported = false;
    void* base = nullptr; // address space only
    size_t size = 0;
};

// A tensor of ours behind a (view of a) ggml tensor: found at the root of its view chain.
struct KvRef {
    bool is_kv = false;         // a KV tensor of this plug-in, allocated or only measured
    KvBuffer* buffer = nullptr; // null while the host only measures (no_alloc)
    KvTensor* tensor = nullptr;
};
KvRef find_kv(const ggml_tensor* tensor);

// Says, once, that all keys are conditioned from the running cache (or why not), or that a profile does not fit them.
// Cheap; to be called when a tensor's source may have changed.
void report_sources(KvBuffer& buffer);

// Sets up both buffer types for `device`. Called once.
void init_buffer_types(ggml_backend_dev_t device);
ggml_backend_buffer_type_t default_buffer_type(); // host memory, except for KV tensors
ggml_backend_buffer_type_t kv_buffer_type();      // what KV buffers say they are
int live_kv_buffers();                            // allocated now, in this process

} // namespace turboquant::plugin
