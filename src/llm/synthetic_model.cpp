#include "llm/synthetic_model.h"

#include "llm/error.h"
#include "llm/plan.h"
#include "llm/user_cache.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <system_error>

#include <fmt/format.h>
#include <ggml.h>
#include <gguf.h>
#include <unistd.h>

namespace turboquant::llm {
namespace {

namespace fs = std::filesystem;

// Part of the files' names: raise it when what is written below changes.
constexpr int kRecipe = 1;
constexpr int kContext = 262144;
constexpr float kEpsilon = 1e-5F;
// Queries and keys: scores with a standard deviation of about two.
constexpr double kAttentionGain = 1.4;

struct GgufDeleter {
    void operator()(gguf_context* gguf) const { gguf_free(gguf); }
};
struct ContextDeleter {
    void operator()(ggml_context* context) const { ggml_free(context); }
};
struct FileDeleter {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

// One tensor of the file. Matrices [outputs][inputs] are Q8_0, norms (outputs == 1) are ones in F32.
struct Tensor {
    std::string name;
    int64_t inputs = 0;
    int64_t outputs = 1;
    double deviation = 0;
};

std::vector<Tensor> tensors_of(const SyntheticShape& s) {
    std::vector<Tensor> tensors;
    const auto norm = [&](const std::string& name, int size) { tensors.push_back({name + ".weight", size, 1, 0}); };
    const auto matrix = [&](const std::string& name, int inputs, int outputs, double gain = 1) {
        tensors.push_back({name + ".weight", inputs, outputs, gain / std::sqrt(inputs)});
    };
    const int query = s.heads * s.head_size;
    const int kv = s.kv_heads * s.head_size;
    matrix("token_embd", s.hidden, s.vocabulary, std::sqrt(s.hidden));
    norm("output_norm", s.hidden);
    for (int layer = 0; layer < s.layers; ++layer) {
        const std::string block = fmt::format("blk.{}.", layer);
        norm(block + "attn_norm", s.hidden);
        matrix(block + "attn_q", s.hidden, query, kAttentionGain);
        matrix(block + "attn_k", s.hidden, kv, kAttentionGain);
        matrix(block + "attn_v", s.hidden, kv);
        if (std::strcmp(s.architecture, "qwen3") == 0) {
            norm(block + "attn_q_norm", s.head_size);
            norm(block + "attn_k_norm", s.head_size);
        }
        matrix(block + "attn_output", query, s.hidden);
        norm(block + "ffn_norm", s.hidden);
        matrix(block + "ffn_gate", s.hidden, s.feed_forward);
        matrix(block + "ffn_up", s.hidden, s.feed_forward);
        matrix(block + "ffn_down", s.feed_forward, s.hidden);
    }
    return tensors;
}

// SentencePiece with all bytes, so that any text has tokens, in every llama.cpp and its forks.
void set_vocabulary(gguf_context* gguf, int size) {
    constexpr int32_t kNormal = 1;
    constexpr int32_t kUnknown = 2;
    constexpr int32_t kControl = 3;
    constexpr int32_t kByte = 6;
    std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
    std::vector<int32_t> types = {kUnknown, kControl, kControl};
    for (int byte = 0; byte < 256; ++byte) {
        tokens.push_back(fmt::format("<0x{:02X}>", byte));
        types.push_back(kByte);
    }
    while (static_cast<int>(tokens.size()) < size) {
        tokens.push_back(fmt::format("[{}]", tokens.size()));
        types.push_back(kNormal);
    }
    std::vector<const char*> words;
    std::vector<float> scores;
    for (const std::string& token : tokens) {
        words.push_back(token.c_str());
        scores.push_back(-static_cast<float>(scores.size()));
    }
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "llama");
    gguf_set_arr_str(gguf, "tokenizer.ggml.tokens", words.data(), words.size());
    gguf_set_arr_data(gguf, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores.data(), scores.size());
    gguf_set_arr_data(gguf, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), types.size());
    gguf_set_val_u32(gguf, "tokenizer.ggml.unknown_token_id", 0);
    gguf_set_val_u32(gguf, "tokenizer.ggml.bos_token_id", 1);
    gguf_set_val_u32(gguf, "tokenizer.ggml.eos_token_id", 2);
}

void set_metadata(gguf_context* gguf, const SyntheticShape& s) {
    const auto number = [&](const char* key, int value) {
        gguf_set_val_u32(gguf, fmt::format("{}.{}", s.architecture, key).c_str(), static_cast<uint32_t>(value));
    };
    const auto real = [&](const char* key, float value) {
        gguf_set_val_f32(gguf, fmt::format("{}.{}", s.architecture, key).c_str(), value);
    };
    gguf_set_val_str(gguf, "general.architecture", s.architecture);
    gguf_set_val_str(gguf, "general.name", fmt::format("synthetic {}", s.name).c_str());
    gguf_set_val_u32(gguf, "general.file_type", LLAMA_FTYPE_MOSTLY_Q8_0);
    gguf_set_val_u32(gguf, "general.quantization_version", GGML_QNT_VERSION);
    number("context_length", kContext);
    number("embedding_length", s.hidden);
    number("block_count", s.layers);
    number("feed_forward_length", s.feed_forward);
    number("vocab_size", s.vocabulary);
    number("attention.head_count", s.heads);
    number("attention.head_count_kv", s.kv_heads);
    number("attention.key_length", s.head_size);
    number("attention.value_length", s.head_size);
    number("rope.dimension_count", s.head_size);
    real("attention.layer_norm_rms_epsilon", kEpsilon);
    real("rope.freq_base", s.rope_base);
    set_vocabulary(gguf, s.vocabulary);
}

// Rows of normal numbers, cut out of one pool at random places: drawing a billion of them one by one takes a minute.
class NormalRows {
public:
    NormalRows() : pool_(kPool) {
        // Sums of uniform numbers and not std::normal_distribution, whose numbers differ between standard libraries.
        std::mt19937 random(1);
        for (float& value : pool_) {
            double sum = 0;
            for (int i = 0; i < 4; ++i) {
                sum += static_cast<double>(random()) / 4294967296.0 - 0.5;
            }
            value = static_cast<float>(sum * std::sqrt(3.0)); // four of variance 1/12: variance 1
        }
    }
    void fill(std::vector<float>& row, float deviation) {
        const size_t start = place_() % (kPool - row.size());
        for (size_t i = 0; i < row.size(); ++i) {
            row[i] = pool_[start + i] * deviation;
        }
    }

private:
    static constexpr size_t kPool = size_t{1} << 20;
    std::vector<float> pool_;
    std::mt19937 place_{2};
};

class Writer {
public:
    Writer(fs::path path, const SyntheticShape& shape) : path_(std::move(path)), tensors_(tensors_of(shape)) {
        part_ = path_;
        part_ += fmt::format(".{}.part", ::getpid());
        gguf_.reset(gguf_init_empty());
        set_metadata(gguf_.get(), shape);
        context_.reset(ggml_init({ggml_tensor_overhead() * (tensors_.size() + 1), nullptr, true}));
        for (const Tensor& tensor : tensors_) {
            ggml_tensor* t = tensor.outputs == 1
                                 ? ggml_new_tensor_1d(context_.get(), GGML_TYPE_F32, tensor.inputs)
                                 : ggml_new_tensor_2d(context_.get(), GGML_TYPE_Q8_0, tensor.inputs, tensor.outputs);
            ggml_set_name(t, tensor.name.c_str());
            gguf_add_tensor(gguf_.get(), t);
            total_ += ggml_nbytes(t);
        }
    }
    ~Writer() {
        std::error_code ignored;
        fs::remove(part_, ignored); // gone already when all went well
    }
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;

    void write(const Progress& progress) {
        std::error_code failed;
        const fs::space_info space = fs::space(path_.parent_path(), failed);
        if (!failed && space.available < total_) {
            throw Error(fmt::format("{}: needs {}, the disk has {}; make room or set XDG_CACHE_HOME to another one",
                                    path_.string(), format_bytes(static_cast<int64_t>(total_)),
                                    format_bytes(static_cast<int64_t>(space.available))));
        }
        file_.reset(std::fopen(part_.c_str(), "wb"));
        check(file_ != nullptr && gguf_write_to_file_ptr(gguf_.get(), file_.get(), true));
        NormalRows rows;
        size_t done = 0;
        for (size_t i = 0; i < tensors_.size(); ++i) {
            done += write_tensor(tensors_[i], static_cast<int64_t>(i), rows);
            if (progress) {
                progress(static_cast<double>(done) / static_cast<double>(total_));
            }
        }
        check(std::fflush(file_.get()) == 0 && ::fsync(::fileno(file_.get())) == 0);
        file_.reset();
        fs::rename(part_, path_, failed);
        if (failed) {
            throw Error(fmt::format("{}: cannot be put in place: {}", path_.string(), failed.message()));
        }
    }

private:
    void check(bool well) const {
        if (!well) {
            throw Error(fmt::format("{}: cannot be written: {}; make room or set XDG_CACHE_HOME to another folder",
                                    part_.string(), std::strerror(errno)));
        }
    }

    size_t write_tensor(const Tensor& tensor, int64_t index, NormalRows& rows) {
        constexpr int64_t kRows = 256; // at a time
        std::vector<float> row(static_cast<size_t>(tensor.inputs), 1.0F);
        size_t bytes = 0;
        if (tensor.outputs == 1) {
            bytes = row.size() * sizeof(float);
            check(std::fwrite(row.data(), 1, bytes, file_.get()) == bytes);
        } else {
            const size_t row_bytes = ggml_row_size(GGML_TYPE_Q8_0, tensor.inputs);
            std::vector<uint8_t> block(row_bytes * kRows);
            for (int64_t first = 0; first < tensor.outputs; first += kRows) {
                const int64_t n = std::min(kRows, tensor.outputs - first);
                for (int64_t i = 0; i < n; ++i) {
                    rows.fill(row, static_cast<float>(tensor.deviation));
                    ggml_quantize_chunk(GGML_TYPE_Q8_0, row.data(), block.data() + row_bytes * static_cast<size_t>(i),
                                        0, 1, tensor.inputs, nullptr);
                }
                const size_t chunk = row_bytes * static_cast<size_t>(n);
                check(std::fwrite(block.data(), 1, chunk, file_.get()) == chunk);
                bytes += chunk;
            }
        }
        // Every tensor begins at a multiple of the file's alignment, and the file ends at one.
        const size_t alignment = gguf_get_alignment(gguf_.get());
        const size_t end = gguf_get_tensor_offset(gguf_.get(), index) + bytes;
        const std::vector<char> zeros((alignment - end % alignment) % alignment);
        check(std::fwrite(zeros.data(), 1, zeros.size(), file_.get()) == zeros.size());
        return bytes;
    }

    fs::path path_;
    fs::path part_;
    std::vector<Tensor> tensors_;
    std::unique_ptr<gguf_context, GgufDeleter> gguf_;
    std::unique_ptr<ggml_context, ContextDeleter> context_;
    std::unique_ptr<std::FILE, FileDeleter> file_;
    size_t total_ = 0;
};

} // namespace

const std::vector<SyntheticShape>& synthetic_shapes() {
    static const std::vector<SyntheticShape> shapes = {
        {"llama-1b", "llama", 16, 2048, 32, 8, 64, 8192, 32000, 500000.0F,
         "as Llama 3.2 1B with a vocabulary of 32,000 for 128,256"},
        {"qwen3-0.6b", "qwen3", 28, 1024, 16, 8, 128, 3072, 32000, 1000000.0F,
         "as Qwen3 0.6B with a vocabulary of 32,000 for 151,936"},
        {"hd128-8l", "llama", 8, 1024, 8, 2, 128, 2816, 32000, 10000.0F, ""},
    };
    return shapes;
}

std::string synthetic_names() {
    std::string names;
    for (const SyntheticShape& shape : synthetic_shapes()) {
        names += (names.empty() ? "" : ", ") + std::string(shape.name);
    }
    return names;
}

const SyntheticShape& find_synthetic_shape(const std::string& name) {
    const auto& shapes = synthetic_shapes();
    const auto found =
        std::find_if(shapes.begin(), shapes.end(), [&](const SyntheticShape& shape) { return name == shape.name; });
    if (found == shapes.end()) {
        throw UsageError(
            fmt::format("--synthetic {}: unknown; use one of {}", name.empty() ? "''" : name, synthetic_names()));
    }
    return *found;
}

std::string synthetic_model(const SyntheticShape& shape, const Progress& progress) {
    const fs::path path = user_cache_folder("models") / fmt::format("synthetic-{}-{}.gguf", shape.name, kRecipe);
    std::error_code ignored;
    if (!fs::exists(path, ignored)) {
        Writer(path, shape).write(progress);
    }
    return path.string();
}

} // namespace turboquant::llm
