// What a model needs in memory, found out without loading it: libllama is asked to lay the model and a context out
// with nothing allocated, and its log tells which layers have a cache of how many cells. So every architecture's own
// rules (sliding windows, shared caches, recurrent layers) count as libllama applies them.
#pragma once

#include "llm/kv_choice.h"
#include "llm/log_lines.h"
#include "llm/model.h"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace turboquant::llm {

struct CacheLayer {
    int index = 0;
    bool sliding = false;
    int64_t cells = 0;
    int kv_heads = 0;
    int key_size = 0;   // channels of a head
    int value_size = 0; // 0: no value rows (multi-head latent attention)
};

// A model's caches for one context length.
struct CachePlan {
    int64_t context = 0;
    std::vector<CacheLayer> layers;
    int64_t recurrent_bytes = 0;
    int recurrent_layers = 0;
    int64_t compute_bytes = 0;
    double f16_scale = 1; // libllama's own count of f16 bytes over the one by shape; 1 where the shape is understood
};

// Bytes of all K and V rows in this kind of cache. TurboQuant: as the plug-in allocates them.
int64_t kv_bytes(const CachePlan& plan, const KvChoice& choice);
// "64", "576/512", or empty where layers differ.
std::string shared_head_size(const CachePlan& plan);

class ModelPlan {
public:
    // Reads the file's metadata only. Error when it is no model that libllama knows.
    explicit ModelPlan(const std::string& path);

    std::string path;
    std::string architecture;
    std::string name;        // general.name, may be empty
    std::string description; // "llama 135M Q4_1"
    uint64_t parameters = 0;
    int64_t weight_bytes = 0;
    int trained_context = 0;
    int layers = 0;
    int heads = 0;
    int sliding_window = 0; // 0: none
    bool has_chat_template = false;

    // context: any number of tokens >= 1; rounded up to libllama's granularity of 256. Cheap whatever its size.
    CachePlan plan(int64_t context) const;
    // Weights + caches of so many sequences + libllama's compute buffers.
    int64_t total_bytes(const CachePlan& plan, const KvChoice& choice, int sequences = 1) const;
    // The largest multiple of 256 whose total_bytes fits into `available`; 0 if none does.
    int64_t largest_context(const KvChoice& choice, int64_t available) const;

private:
    CachePlan dry_run(int64_t context) const;
    const CachePlan& measured(int64_t context) const;
    void read_metadata();

    ModelHandle handle_;                                  // without tensors' data
    std::map<std::string, std::vector<int64_t>> numbers_; // integers and arrays of integers of the metadata
    mutable std::map<int64_t, CachePlan> measured_;
};

// The context that is used when none is asked for: what the model was trained for, at most 8192. 0 asks for all of it.
int64_t choose_context(const ModelPlan& model, std::optional<int64_t> asked);

// Throws Error with the numbers (needed, there is, what would fit) when the model with this cache cannot fit.
void check_fit(const ModelPlan& model, const CachePlan& plan, const KvChoice& choice);

// 1536 -> "1.5 KiB"; three significant digits or more.
std::string format_bytes(int64_t bytes);
// 1048576 -> "1,048,576".
std::string format_count(int64_t count);

} // namespace turboquant::llm
