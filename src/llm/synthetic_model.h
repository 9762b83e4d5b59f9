// Models of known shapes with random Q8_0 weights: good for speed, which depends on the shape alone, and for nothing else.
#pragma once

#include "llm/model.h"

#include <string>
#include <vector>

namespace turboquant::llm {

struct SyntheticShape {
    const char* name;
    const char* architecture; // llama or qwen3
    int layers;
    int hidden;
    int heads;
    int kv_heads;
    int head_size;
    int feed_forward;
    int vocabulary;
    float rope_base;
    const char* note; // where it differs from the model it is named after; empty: nowhere that speed would tell
};

// llama-1b, qwen3-0.6b, hd128-8l.
const std::vector<SyntheticShape>& synthetic_shapes();
// Their names with commas between, for messages.
std::string synthetic_names();
// UsageError that lists the names.
const SyntheticShape& find_synthetic_shape(const std::string& name);

// The path of the model's GGUF in the user's cache folder, written there if it is not: same bytes on every machine. Weights
// have variance 1/inputs, queries and keys twice that, so that attention is neither uniform nor a single token. The
// vocabulary is one of bytes, filled up with tokens that mean nothing; output and input embeddings are the same tensor.
// Error when the folder cannot be written or has no room.
std::string synthetic_model(const SyntheticShape& shape, const Progress& progress);

} // namespace turboquant::llm
