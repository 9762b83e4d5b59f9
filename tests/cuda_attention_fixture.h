// Attention on the GPU, decoding or prefill, and the same in double precision over the decoded rows.
#pragma once

#include "cuda_testing.h"

namespace turboquant::cuda_tests {

struct AttentionCase {
    CacheShape shape;
    int group = 4;
    int q_len = 1;
    std::vector<int32_t> lengths = {200};
    float softcap = 0;
    int sliding_window = 0;
    bool not_causal = false;
    bool sink_logits = false;
    bool conditioned = false;
    int mu_blocks = 0; // conditioned: so many means, of 256 positions each
    int sinks = 0;
    int window = 0;
    int ring = 0; // 0: window + q_len - 1
    int n_blocks = 0;
    bool prefill = false;   // tq_cuda_prefill instead of tq_cuda_attend
    bool small = false;     // prefill: with the least workspace
    int32_t max_length = 0; // of a prefill; 0: the longest sequence's, and some
    bool unaligned = false; // q and out begin one element further
    bool peaky = false;     // queries near some keys: large scores
    tq_cuda_type type = TQ_CUDA_F32;
    uint32_t seed = 1;
};

inline std::ostream& operator<<(std::ostream& o, const AttentionCase& c) {
    o << "d " << c.shape.head_size << " kv heads " << c.shape.kv_heads << " group " << c.group << " bits "
      << c.shape.key_bits << '/' << c.shape.value_bits << " page " << c.shape.page_size << " q_len " << c.q_len
      << " softcap " << c.softcap << " sliding " << c.sliding_window << " not causal " << c.not_causal
      << " sink logits " << c.sink_logits << " conditioned " << c.conditioned << " means " << c.mu_blocks << " sinks "
      << c.sinks << " window " << c.window << " ring " << c.ring << " blocks " << c.n_blocks << " prefill " << c.prefill
      << " small " << c.small << " type " << c.type << " seed " << c.seed << " lengths";
    for (const int32_t n : c.lengths) {
        o << ' ' << n;
    }
    return o;
}

// A cache with rows of every sequence, and what attention over it should give.
class Fixture {
public:
    explicit Fixture(const AttentionCase& c) : case_(c), random_(c.seed) {
        layout();
        fill();
        queries();
    }

    // Relative error of one call; poisons the output first.
    double error() {
        const size_t n = q_.size();
        const size_t width = case_.type == TQ_CUDA_F32 ? 4 : 2;
        const size_t shift = case_.unaligned ? width : 0; // bytes
        std::vector<uint8_t> q_bytes = convert(q_);
        q_bytes.insert(q_bytes.begin(), shift, 0);
        const Device<uint8_t> q(q_bytes);
        const Device<uint8_t> out(shift + n * width, 0xff);
        tq_cuda_attention a = arguments();
        a.q = q.get() + shift;
        a.out = out.get() + shift;
        size_t bytes = 0;
        if (case_.prefill) {
            size_t all = 0;
            a.max_length = case_.max_length > 0 ? case_.max_length
                                                : *std::max_element(case_.lengths.begin(), case_.lengths.end()) + 70;
            EXPECT_EQ(tq_cuda_prefill_workspace_bytes(&cache_, &a, &bytes, &all), TQ_OK) << tq_cuda_last_error();
            EXPECT_EQ(all, bytes * case_.lengths.size() * static_cast<size_t>(case_.shape.kv_heads));
            bytes = case_.small ? bytes : all;
        } else {
            EXPECT_EQ(tq_cuda_workspace_bytes(&cache_, &a, &bytes), TQ_OK) << tq_cuda_last_error();
        }
        // A decoding's workspace begins as zeros; a prefill's may hold anything, here NaN.
        const Device<uint8_t> workspace(bytes, case_.prefill ? 0xff : 0);
        a.workspace = workspace.get();
        a.workspace_size = bytes;
        std::vector<float> first;
        double worst = 0;
        const std::vector<double> want = reference();
        for (int run = 0; run < 2; ++run) { // the second finds what the first left in the workspace
            EXPECT_EQ((case_.prefill ? tq_cuda_prefill : tq_cuda_attend)(&cache_, &a, nullptr), TQ_OK)
                << tq_cuda_last_error();
            EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
            std::vector<uint8_t> out_bytes = out.host();
            out_bytes.erase(out_bytes.begin(), out_bytes.begin() + static_cast<std::ptrdiff_t>(shift));
            const std::vector<float> got = floats(out_bytes);
            if (run == 0) {
                first = got;
            } else {
                EXPECT_EQ(first, got) << "two runs differ";
            }
            double difference = 0;
            double norm = 0;
            for (size_t i = 0; i < n; ++i) {
                difference += (got[i] - want[i]) * (got[i] - want[i]);
                norm += want[i] * want[i];
            }
            worst = std::max(worst, norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference));
            if (!std::isfinite(difference)) {
                return INFINITY;
            }
        }
        return worst;
    }

private:
    int batch() const { return static_cast<int>(case_.lengths.size()); }
    int heads() const { return case_.shape.kv_heads * case_.group; }
    int ring() const { return case_.ring > 0 ? case_.ring : case_.window > 0 ? case_.window + case_.q_len - 1 : 0; }
    int elements() const { return case_.shape.kv_heads * case_.shape.head_size; }

    void layout() {
        const int page = case_.shape.page_size;
        int64_t total = 1;
        for (const int32_t n : case_.lengths) {
            pages_of_ = std::max<int64_t>(pages_of_, (n + page - 1) / page);
            total += (n + page - 1) / page;
        }
        pages_of_ = std::max<int64_t>(pages_of_, 1);
        case_.shape.n_pages = total;
        cache_ = make_cache(case_.shape);
        pages_ = std::make_unique<Device<uint8_t>>(tq_cuda_page_bytes(&cache_) * static_cast<size_t>(total), 0xff);
        cache_.pages = pages_->get();
        std::vector<int32_t> order(static_cast<size_t>(total));
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_);
        std::vector<int32_t> table(static_cast<size_t>(batch() * pages_of_), -1); // -1: a look-up that must not happen
        size_t next = 0;
        for (int b = 0; b < batch(); ++b) {
            for (int64_t p = 0; p < (case_.lengths[static_cast<size_t>(b)] + page - 1) / page; ++p) {
                table[static_cast<size_t>(b * pages_of_ + p)] = order[next++];
            }
        }
        for (int b = 0; b < batch(); ++b) {
            for (int32_t t = 0; t < case_.lengths[static_cast<size_t>(b)]; ++t) {
                positions_.push_back(t);
                slots_.push_back(int64_t{table[static_cast<size_t>(b * pages_of_ + t / page)]} * page + t % page);
            }
        }
        table_ = std::make_unique<Device<int32_t>>(table);
        lengths_ = std::make_unique<Device<int32_t>>(case_.lengths);
        std::vector<int32_t> sequence_slots(static_cast<size_t>(batch()));
        std::iota(sequence_slots.rbegin(), sequence_slots.rend(), 0);
        sequence_slots_ = std::make_unique<Device<int32_t>>(sequence_slots);
        if (case_.sinks > 0 || ring() > 0) {
            const size_t rows = static_cast<size_t>(batch() * (case_.sinks + ring()) * elements());
            exact_[0] = std::make_unique<Device<uint16_t>>(rows, 0xff);
            exact_[1] = std::make_unique<Device<uint16_t>>(rows, 0xff);
            cache_.exact_keys = exact_[0]->get();
            cache_.exact_values = exact_[1]->get();
            cache_.sinks = case_.sinks;
            cache_.ring = ring();
            cache_.window = case_.window;
            for (int b = 0; b < batch(); ++b) {
                const int32_t length = case_.lengths[static_cast<size_t>(b)];
                for (int32_t t = 0; t < length; ++t) {
                    const bool sink = t < case_.sinks;
                    const bool latest = !sink && ring() > 0 && t >= length - ring();
                    const int64_t entry = sink ? t : case_.sinks + (t - case_.sinks) % std::max(ring(), 1);
                    exact_rows_.push_back(
                        sink || latest ? sequence_slots[static_cast<size_t>(b)] * int64_t{case_.sinks + ring()} + entry
                                       : -1);
                }
            }
        }
    }

    void fill() {
        const auto n = static_cast<int64_t>(slots_.size());
        std::normal_distribution<float> normal;
        for (auto& side : rows_) {
            side.resize(static_cast<size_t>(n * elements()));
            for (float& x : side) {
                x = normal(random_);
            }
        }
        if (case_.conditioned) {
            for (int e = 0; e < elements(); ++e) {
                lambda_.push_back(std::exp(0.4F * normal(random_)));
            }
            mu_.resize(static_cast<size_t>(elements() * std::max(case_.mu_blocks, 1)));
            for (float& x : mu_) {
                x = 2 * normal(random_);
            }
            for (size_t i = 0; i < rows_[0].size(); ++i) { // keys that the conditioning is for
                const size_t e = i % static_cast<size_t>(elements());
                const int64_t position = positions_[i / static_cast<size_t>(elements())];
                const int64_t block = case_.mu_blocks > 0 ? std::min<int64_t>(position / 256, case_.mu_blocks - 1) : 0;
                rows_[0][i] = rows_[0][i] / lambda_[e] + mu_[static_cast<size_t>(block * elements()) + e];
            }
        }
        for (auto& side : rows_) { // as the format keeps them: fp16, a row's first 64 without their lowest bit
            for (size_t i = 0; i < side.size(); ++i) {
                const bool tagged = i % static_cast<size_t>(elements()) < 64;
                side[i] = from_half(static_cast<uint16_t>(to_half(side[i]) & (tagged ? 0xfffeU : 0xffffU)));
            }
        }
        device_mu_ = std::make_unique<Device<float>>(mu_);
        device_lambda_ = std::make_unique<Device<float>>(lambda_);
        if (case_.conditioned) {
            cache_.mu = device_mu_->get();
            cache_.lambda = device_lambda_->get();
            cache_.mu_blocks = case_.mu_blocks;
        }
        if (n == 0) {
            return;
        }
        const Device<float> keys(rows_[0]);
        const Device<float> values(rows_[1]);
        const Device<int64_t> slots(slots_);
        const Device<int64_t> exact(exact_rows_);
        const Device<int64_t> positions(positions_);
        tq_cuda_write write{};
        write.struct_size = sizeof write;
        write.keys = keys.get();
        write.values = values.get();
        write.key_stride = write.value_stride = elements();
        write.key_head_stride = write.value_head_stride = case_.shape.head_size;
        write.n = n;
        write.slots = slots.get();
        write.exact_rows = exact_rows_.empty() ? nullptr : exact.get();
        write.positions = case_.mu_blocks > 0 ? positions.get() : nullptr;
        EXPECT_EQ(tq_cuda_encode(&cache_, &write, nullptr), TQ_OK) << tq_cuda_last_error();
        const size_t side = static_cast<size_t>(n * elements());
        const Device<float> decoded(2 * side, 0xff);
        EXPECT_EQ(tq_cuda_read(&cache_, slots.get(), write.positions, n, nullptr, nullptr, decoded.get(), TQ_CUDA_F32,
                               0, nullptr),
                  TQ_OK);
        const std::vector<float> all = decoded.host();
        decoded_[0].assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(side));
        decoded_[1].assign(all.begin() + static_cast<std::ptrdiff_t>(side), all.end());
        // Decoded rows are the rows, but for the codec's error: 4 bits leave 10 %.
        double difference = 0;
        double norm = 0;
        for (size_t i = 0; i < side; ++i) {
            difference += std::pow(decoded_[1][i] - rows_[1][i], 2);
            norm += std::pow(rows_[1][i], 2);
        }
        const double bound = case_.shape.value_bits == 8 ? 0.02 : std::pow(0.5, case_.shape.value_bits) * 1.8;
        EXPECT_LT(std::sqrt(difference / norm), bound);
    }

    void queries() {
        std::normal_distribution<float> normal;
        q_.resize(static_cast<size_t>(batch() * case_.q_len * heads() * case_.shape.head_size));
        for (float& x : q_) {
            x = normal(random_) * (case_.peaky ? 4.0F : 1.0F);
            x = case_.type == TQ_CUDA_F32 ? x : from_half(to_half(x));
            if (case_.type == TQ_CUDA_BF16) {
                x = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffff0000U);
            }
        }
        for (int h = 0; h < heads(); ++h) {
            logits_.push_back(normal(random_) + 2);
        }
        device_logits_ = std::make_unique<Device<float>>(logits_);
    }

    tq_cuda_attention arguments() const {
        tq_cuda_attention a{};
        a.struct_size = sizeof a;
        a.type = case_.type;
        // (sequence, query, head) in another order for q than for out
        const int64_t d = case_.shape.head_size;
        a.q_head = d;
        a.q_query = d * heads();
        a.q_batch = a.q_query * case_.q_len;
        a.out_query = d;
        a.out_head = d * case_.q_len;
        a.out_batch = a.out_head * heads();
        a.batch = batch();
        a.q_len = case_.q_len;
        a.heads = heads();
        a.page_table = table_->get();
        a.page_table_stride = pages_of_;
        a.lengths = lengths_->get();
        a.sequence_slots = sequence_slots_->get();
        a.softcap = case_.softcap;
        a.not_causal = case_.not_causal ? 1 : 0;
        a.sliding_window = case_.sliding_window;
        a.sink_logits = case_.sink_logits ? device_logits_->get() : nullptr;
        a.n_blocks = case_.n_blocks;
        return a;
    }

    std::vector<double> reference() const {
        const int d = case_.shape.head_size;
        std::vector<double> out(q_.size());
        int64_t row0 = 0;
        for (int b = 0; b < batch(); ++b) {
            const int64_t length = case_.lengths[static_cast<size_t>(b)];
            for (int i = 0; i < case_.q_len; ++i) {
                const int64_t end = case_.not_causal ? length : length - case_.q_len + i + 1;
                for (int h = 0; h < heads(); ++h) {
                    const int kv = h / case_.group;
                    const float* const q = &q_[static_cast<size_t>(((b * case_.q_len + i) * heads() + h) * d)];
                    double* const o = &out[static_cast<size_t>(((b * heads() + h) * case_.q_len + i) * d)];
                    std::vector<double> score;
                    std::vector<const float*> value;
                    for (int64_t t = 0; t < end; ++t) {
                        if (case_.sliding_window > 0 && t < end - case_.sliding_window) {
                            continue;
                        }
                        const bool exact =
                            t < case_.sinks || (case_.window > 0 && t >= end - case_.window && t >= length - ring());
                        const auto at = static_cast<size_t>(((row0 + t) * case_.shape.kv_heads + kv) * d);
                        const float* const k = (exact ? rows_[0] : decoded_[0]).data() + at;
                        double s = 0;
                        for (int e = 0; e < d; ++e) {
                            s += static_cast<double>(q[e]) * k[e];
                        }
                        s /= std::sqrt(static_cast<double>(d));
                        score.push_back(case_.softcap > 0 ? case_.softcap * std::tanh(s / case_.softcap) : s);
                        value.push_back((exact ? rows_[1] : decoded_[1]).data() + at);
                    }
                    if (score.empty()) {
                        continue;
                    }
                    double top = *std::max_element(score.begin(), score.end());
                    double total = 0;
                    if (case_.sink_logits) {
                        top = std::max<double>(top, logits_[static_cast<size_t>(h)]);
                        total = std::exp(logits_[static_cast<size_t>(h)] - top);
                    }
                    for (size_t t = 0; t < score.size(); ++t) {
                        const double p = std::exp(score[t] - top);
                        total += p;
                        for (int e = 0; e < d; ++e) {
                            o[e] += p * value[t][e];
                        }
                    }
                    for (int e = 0; e < d; ++e) {
                        o[e] /= total;
                    }
                }
            }
            row0 += length;
        }
        return out;
    }

    std::vector<uint8_t> convert(const std::vector<float>& x) const {
        const size_t width = case_.type == TQ_CUDA_F32 ? 4 : 2;
        std::vector<uint8_t> out(x.size() * width);
        for (size_t i = 0; i < x.size(); ++i) {
            const auto bits = std::bit_cast<uint32_t>(x[i]);
            const uint32_t v = case_.type == TQ_CUDA_F32   ? bits
                               : case_.type == TQ_CUDA_F16 ? to_half(x[i])
                                                           : bits >> 16;
            std::memcpy(out.data() + i * width, &v, width);
        }
        return out;
    }
    std::vector<float> floats(const std::vector<uint8_t>& x) const {
        const size_t width = case_.type == TQ_CUDA_F32 ? 4 : 2;
        std::vector<float> out(x.size() / width);
        for (size_t i = 0; i < out.size(); ++i) {
            uint32_t v = 0;
            std::memcpy(&v, x.data() + i * width, width);
            out[i] = case_.type == TQ_CUDA_F16 ? from_half(static_cast<uint16_t>(v))
                                               : std::bit_cast<float>(case_.type == TQ_CUDA_F32 ? v : v << 16);
        }
        return out;
    }

    AttentionCase case_;
    std::mt19937 random_;
    tq_cuda_cache cache_{};
    int64_t pages_of_ = 0;
    std::vector<int64_t> slots_;
    std::vector<int64_t> exact_rows_, positions_;
    std::vector<float> rows_[2], decoded_[2], mu_, lambda_, q_, logits_;
    std::unique_ptr<Device<uint8_t>> pages_;
    std::unique_ptr<Device<int32_t>> table_, lengths_, sequence_slots_;
    std::unique_ptr<Device<uint16_t>> exact_[2];
    std::unique_ptr<Device<float>> device_mu_, device_lambda_, device_logits_;
};

inline void check(const AttentionCase& c, double bound = 3e-4) {
    Fixture fixture(c);
    EXPECT_LT(fixture.error(), bound) << c;
}

// A case with a mean for every 256 positions: fewer means than there are positions for, and more.
inline void check_means_by_position(const AttentionCase& shape) {
    for (const int blocks : {1, 2, 4, 40}) {
        AttentionCase c = shape;
        c.seed = static_cast<uint32_t>(blocks + c.q_len);
        c.conditioned = true;
        c.mu_blocks = blocks;
        check(c, 6e-4);
        c.sink_logits = true;
        c.sinks = 4;
        c.window = 40;
        check(c, 1e-3);
        c.softcap = 15;
        c.sliding_window = 300;
        check(c, 1e-3);
    }
}

// Captured once, replayed with other lengths in the same device memory: nothing of them was read on the host.
inline void check_in_a_graph(int q_len, bool prefill) {
    CacheShape shape;
    shape.n_pages = 64;
    tq_cuda_cache cache = make_cache(shape);
    const Device<uint8_t> pages(tq_cuda_page_bytes(&cache) * 64);
    cache.pages = pages.get();
    const int elements = shape.kv_heads * shape.head_size;
    std::mt19937 random(3);
    const Device<float> rows(make_rows(random, 4096, elements, shape.head_size, false));
    std::vector<int64_t> slots(4096);
    std::iota(slots.begin(), slots.end(), 0);
    const Device<int64_t> device_slots(slots);
    std::vector<int32_t> table(64);
    std::iota(table.begin(), table.end(), 0);
    const Device<int32_t> device_table(table);
    const Device<int32_t> lengths(1);
    const int heads = shape.kv_heads * 4;
    std::vector<float> queries(static_cast<size_t>(q_len * heads * shape.head_size));
    std::normal_distribution<float> normal;
    std::generate(queries.begin(), queries.end(), [&] { return normal(random); });
    const Device<float> q(queries);
    const Device<float> out(static_cast<size_t>(q_len * heads * shape.head_size));
    tq_cuda_write write{};
    write.struct_size = sizeof write;
    write.keys = write.values = rows.get();
    write.key_stride = write.value_stride = elements;
    write.key_head_stride = write.value_head_stride = shape.head_size;
    write.n = 4096;
    write.slots = device_slots.get();
    tq_cuda_attention a{};
    a.struct_size = sizeof a;
    a.q = q.get();
    a.out = out.get();
    a.q_query = a.out_query = heads * shape.head_size;
    a.q_head = a.out_head = shape.head_size;
    a.batch = 1;
    a.q_len = q_len;
    a.max_length = prefill ? 4096 : 0;
    a.heads = heads;
    a.page_table = device_table.get();
    a.page_table_stride = 64;
    a.lengths = lengths.get();
    size_t least = 0;
    size_t bytes = 0;
    ASSERT_EQ(prefill ? tq_cuda_prefill_workspace_bytes(&cache, &a, &least, &bytes)
                      : tq_cuda_workspace_bytes(&cache, &a, &bytes),
              TQ_OK)
        << tq_cuda_last_error();
    const auto attend = prefill ? tq_cuda_prefill : tq_cuda_attend;
    const Device<uint8_t> workspace(bytes);
    a.workspace = workspace.get();
    a.workspace_size = bytes;
    cudaStream_t stream = nullptr;
    TQ_CUDA_OK(cudaStreamCreate(&stream));
    TQ_CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    ASSERT_EQ(tq_cuda_encode(&cache, &write, stream), TQ_OK) << tq_cuda_last_error();
    ASSERT_EQ(attend(&cache, &a, stream), TQ_OK) << tq_cuda_last_error();
    cudaGraph_t graph = nullptr;
    TQ_CUDA_OK(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t exec = nullptr;
    TQ_CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    for (const int32_t length : {4096, 10, 1000}) { // the second shorter than some prompts
        TQ_CUDA_OK(cudaMemcpy(lengths.get(), &length, sizeof length, cudaMemcpyHostToDevice));
        TQ_CUDA_OK(cudaGraphLaunch(exec, stream));
        TQ_CUDA_OK(cudaStreamSynchronize(stream));
        const std::vector<float> replayed = out.host();
        ASSERT_EQ(attend(&cache, &a, stream), TQ_OK);
        TQ_CUDA_OK(cudaStreamSynchronize(stream));
        EXPECT_EQ(replayed, out.host()) << length;
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

} // namespace turboquant::cuda_tests
