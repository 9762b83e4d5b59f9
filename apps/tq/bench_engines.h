// The attention kernels that `tq bench attention` compares: ours over compressed stores, ours over fp16 rows, and ggml's
// flash attention over its own cache formats. Each holds as many layers of random keys and values as it takes to keep the
// processor's caches cold, and goes over all of them in a pass.
#pragma once

#include <turboquant/isa.h>
#include <turboquant/parallel.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ggml.h>

namespace turboquant::app {

struct AttentionShape {
    int head_dim = 128;
    int kv_heads = 8;
    int group = 4;
    int64_t context = 32768;
    int64_t queries = 1;
    int threads = 1;
    bool conditioned = false; // keys of ours: means that turn with the position, factors
    bool mask = false;        // fp16 zeros, as llama.cpp passes them; else none
    int64_t cold_bytes = 0;   // all layers of an engine take at least as much
    int heads() const { return kv_heads * group; }
};

// OpenMP's threads, as in the plug-in: ggml's CPU back end uses the same pool. The object must outlive what it lends to.
class OpenMpPool {
public:
    explicit OpenMpPool(int threads) : threads_(threads) {}
    ParallelFor parallel();

private:
    int threads_;
};

class AttentionEngine {
public:
    virtual ~AttentionEngine() = default;
    // All layers once. Error when the engine refuses.
    virtual void pass() = 0;

    std::string name;   // turboquant, reference, ggml
    std::string layout; // tiles; token-major (llama.cpp's); head-major
    std::string isa;    // "": its own choice
    std::string kv;     // 4/4, f16, q8_0
    int64_t layers = 0;
    int64_t bytes = 0; // keys and values of all layers
};

// Ours; bits 16/16 is the fp16 reference. One engine for each of `isas`, over the same stores.
std::vector<std::unique_ptr<AttentionEngine>> make_our_engines(const AttentionShape& shape, int key_bits,
                                                               int value_bits, const std::vector<Isa>& isas);
// ggml's, over a cache of that type as llama.cpp lays it out (all heads of a token beside each other) or head-major.
std::unique_ptr<AttentionEngine> make_ggml_engine(const AttentionShape& shape, ggml_type type, bool head_major);

// A plain vectorised sum over memory that is larger than the caches, in 2 MB pages where the system has them.
class PureRead {
public:
    PureRead(int64_t bytes, int threads);
    double bytes_per_second();

private:
    struct Free {
        void operator()(uint64_t* words) const;
    };
    int64_t words_;
    std::unique_ptr<uint64_t[], Free> buffer_;
    OpenMpPool pool_;
    std::vector<uint64_t> sums_;
};

// Bytes of the last-level cache; 32 MiB where the system does not say.
int64_t last_level_cache();

} // namespace turboquant::app
