// What the attention tests share: a case in plain numbers, stores filled for it, and an oracle that knows nothing of
// tiles: decoded rows from Store::read of stores without exact rows, exact rows from the written numbers.
#pragma once

#include "cache/rows.h"
#include "turboquant/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace turboquant::attention_tests {

enum class Mask { none, causal, holes, all_hidden, padded, biased };

struct Case {
    int head_size = 64;
    int value_head_size = 0; // 0: head_size
    int value_size = 0;      // > 0: MLA, values are the first channels of the keys
    int kv_heads = 2;
    int group = 2;
    int key_bits = 4;
    int value_bits = 4;
    int64_t rows = 130;  // attended to
    int64_t queries = 1; // the batch: the last rows are its own
    Mask mask = Mask::causal;
    float softcap = 0;
    float max_bias = 0;
    bool sinks = false; // sink logits
    bool mu = false;
    bool turning = false; // with mu: pairs of key channels turn with the position
    int64_t stride = 7;   // from one row's position to the next's
    bool lambda = false;
    int key_window = 0;
    int value_window = 0;
    int pins = 0;
    bool staging = false;
    bool overwrite = false; // some rows are written twice: before the batch, and by it
    bool peaky = false;
    int workers = 1;
    uint32_t seed = 1;

    friend std::ostream& operator<<(std::ostream& o, const Case& c) {
        return o << "head_size=" << c.head_size << '/' << c.value_head_size << '/' << c.value_size
                 << " heads=" << c.kv_heads << 'x' << c.group << " bits=" << c.key_bits << '/' << c.value_bits
                 << " rows=" << c.rows << " queries=" << c.queries << " mask=" << static_cast<int>(c.mask)
                 << " softcap=" << c.softcap << " max_bias=" << c.max_bias << " sinks=" << c.sinks << " mu=" << c.mu
                 << " turning=" << c.turning << " stride=" << c.stride << " lambda=" << c.lambda
                 << " window=" << c.key_window << '/' << c.value_window << " pins=" << c.pins
                 << " staging=" << c.staging << " overwrite=" << c.overwrite << " peaky=" << c.peaky
                 << " workers=" << c.workers << " seed=" << c.seed;
    }
};

// A ParallelFor over std::thread: every call starts its own threads, tasks are drawn from a counter.
class Threads {
public:
    explicit Threads(int n) : n_(n) {}
    ParallelFor parallel() { return {n_ > 1 ? &Threads::run : nullptr, this, n_}; }

private:
    static void run(void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
        const int n = static_cast<Threads*>(context)->n_;
        std::atomic<int64_t> next{0};
        std::vector<std::thread> threads;
        threads.reserve(static_cast<size_t>(n));
        for (int w = 0; w < n; ++w) {
            threads.emplace_back([&, w] {
                for (int64_t i = next++; i < n_tasks; i = next++) {
                    task(arg, i, w);
                }
            });
        }
        for (std::thread& t : threads) {
            t.join();
        }
    }
    int n_;
};

inline float through_half(float x) {
    return from_half(to_half(x));
}

// Stores, queries and mask of a case, and what the right answer is.
class Fixture {
public:
    explicit Fixture(const Case& c) : case_(c), random_(c.seed) {
        if (case_.value_head_size == 0) {
            case_.value_head_size = c.head_size;
        }
        make_stores();
        write_rows();
        make_queries();
        make_mask();
    }

    AttentionCall call(std::vector<float>& out) const {
        AttentionCall a;
        const int64_t heads = n_heads();
        a.q = q_.data();
        a.q_head_stride = case_.head_size + 3; // strides that are not the obvious ones
        a.q_query_stride = a.q_head_stride * heads + 5;
        a.n_queries = case_.queries;
        a.n_heads = static_cast<int>(heads);
        a.n_rows = case_.rows;
        a.mask = mask_.empty() ? nullptr : mask_.data();
        a.mask_query_stride = mask_stride();
        a.scale = scale_;
        a.softcap = case_.softcap;
        a.max_bias = case_.max_bias;
        a.sink_logits = sink_logits_.empty() ? nullptr : sink_logits_.data();
        a.out_head_stride = out_size() + 1;
        a.out_query_stride = a.out_head_stride * heads + 2;
        out.assign(static_cast<size_t>(a.out_query_stride * case_.queries), kUntouched);
        a.out = out.data();
        a.k_staging = case_.staging ? &k_staging_ : nullptr;
        a.v_staging = case_.staging ? (is_mla() ? &k_staging_ : &v_staging_) : nullptr;
        a.staging_offset = 0;
        a.value_size = case_.value_size;
        return a;
    }

    bool is_mla() const { return case_.value_size > 0; }
    int64_t n_heads() const { return static_cast<int64_t>(case_.kv_heads) * case_.group; }
    int out_size() const { return is_mla() ? case_.value_size : case_.value_head_size; }
    int64_t mask_stride() const { return case_.rows + 7; }
    Store& k() { return *k_.exact; }
    Store& v() { return is_mla() ? *k_.exact : *v_.exact; }
    const std::string& error() const { return error_; } // of making the stores

    struct Answer {
        std::vector<double> out;
        double terms = 0; // |sum of p |value||: what `out` would be if nothing cancelled
        double reach =
            0; // the largest scale * |q / lambda| |lambda key|: what a 16-bit query's step is multiplied with
    };

    // [query][head]
    std::vector<Answer> oracle() const {
        std::vector<Answer> result;
        for (int64_t i = 0; i < case_.queries; ++i) {
            for (int64_t h = 0; h < n_heads(); ++h) {
                result.push_back(attend_one(i, h));
            }
        }
        return result;
    }

    // Largest |out - oracle| / |oracle| over queries and heads; infinite where zeros or gaps are wrong. Where almost
    // everything cancels, a part of the terms' size is the yardstick: with few channels that happens by chance.
    double worst_error(const std::vector<float>& out, const std::vector<Answer>& want,
                       bool integer_scores = false) const {
        const int64_t head_stride = out_size() + 1;
        const int64_t query_stride = head_stride * n_heads() + 2;
        double worst = 0;
        for (int64_t i = 0; i < case_.queries; ++i) {
            for (int64_t h = 0; h < n_heads(); ++h) {
                const float* got = out.data() + i * query_stride + h * head_stride;
                const Answer& w = want[static_cast<size_t>(i * n_heads() + h)];
                double difference = 0;
                double norm = 0;
                for (size_t c = 0; c < w.out.size(); ++c) {
                    difference += (got[c] - w.out[c]) * (got[c] - w.out[c]);
                    norm += w.out[c] * w.out[c];
                }
                double error =
                    std::sqrt(difference) / std::max(std::sqrt(norm), (out_size() < 16 ? 0.5 : 0.1) * w.terms);
                if (w.terms == 0) {
                    error = difference == 0 ? 0 : kWrong; // sees nothing: zeros
                }
                // A query's step is its largest element / 2^15, some 3.5 |q| / sqrt(d) / 2^15, and moves a score by reach
                // times that over |q|; four standard deviations of it pass kIntTolerance from here on.
                if (integer_scores) {
                    error /= std::max(1.0, w.reach / (4 * std::sqrt(static_cast<double>(case_.head_size))));
                }
                if (std::isnan(error) || got[w.out.size()] != kUntouched) {
                    error = kWrong;
                }
                worst = std::max(worst, error);
            }
        }
        return worst;
    }

private:
    static constexpr float kUntouched = 12345.0f; // between the outputs: must stay
    static constexpr double kWrong = std::numeric_limits<double>::infinity();

    struct Pair {
        std::unique_ptr<Store> exact; // the store under test
        std::unique_ptr<Store> coded; // the same rows, codes only
        std::vector<float> decoded;   // [row][element], of `coded`
        std::vector<float> written;   // [row][element], the latest
        std::vector<int64_t> order;   // [row] when it was written
    };

    void note(const Status& s) {
        if (!s.ok() && error_.empty()) {
            error_ = s.message();
        }
    }
    float normal() { return std::normal_distribution<float>()(random_); }
    float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_); }

    void make_store(Pair& p, Side side, int head_size, int bits, int window) {
        const StoreShape shape{side, head_size, case_.kv_heads, case_.rows + 70};
        Conditioning conditioning;
        const size_t n = static_cast<size_t>(shape.row_elements());
        if (case_.mu) {
            for (size_t i = 0; i < n; ++i) {
                conditioning.mu.push_back(2 * normal());
            }
        }
        if (case_.lambda) {
            for (size_t i = 0; i < n; ++i) {
                conditioning.lambda.push_back(std::exp2(uniform(-1.5f, 1.5f)));
            }
        }
        if (case_.turning && side == Side::key) { // all but the last channels, the last pair standing still
            const int pairs = std::max(1, head_size / 2 - 3);
            for (int i = 0; i < pairs; ++i) {
                conditioning.rope.push_back(
                    {static_cast<uint16_t>(2 * i), static_cast<uint16_t>(2 * i + 1),
                     i == pairs - 1 ? 0.0F : std::exp2(-12.0F * static_cast<float>(i) / static_cast<float>(pairs))});
            }
        }
        Status s = Store::create(shape, {bits, window, case_.pins}, conditioning, p.exact);
        note(s);
        s = Store::create(shape, {bits, 0, 0}, conditioning, p.coded);
        note(s);
        p.written.resize(static_cast<size_t>(case_.rows) * n);
        p.decoded.resize(p.written.size());
        p.order.assign(static_cast<size_t>(case_.rows), -1);
    }

    void make_stores() {
        make_store(k_, Side::key, case_.head_size, case_.key_bits, case_.key_window);
        if (!is_mla()) {
            make_store(v_, Side::value, case_.value_head_size, case_.value_bits, case_.value_window);
        }
    }

    void write(Pair& p, const std::vector<int64_t>& rows, Staging* staging, int64_t& clock) {
        if (rows.empty()) {
            return;
        }
        const size_t n = static_cast<size_t>(p.exact->shape().row_elements());
        const std::vector<float>& mu = p.exact->conditioning().mu;
        std::vector<float> x;
        std::vector<int32_t> positions; // long runs, and some rows of other sequences in between
        positions.reserve(rows.size());
        for (int64_t r : rows) {
            positions.push_back(static_cast<int32_t>(r % 19 == 7 ? 5000 - r : case_.stride * r));
        }
        for (int64_t r : rows) {
            const float size = std::exp2(uniform(-1, 1));
            for (size_t c = 0; c < n; ++c) {
                const float value = through_half(size * normal() + (mu.empty() ? 0.0f : mu[c]));
                x.push_back(value);
                p.written[static_cast<size_t>(r) * n + c] = value;
            }
            p.order[static_cast<size_t>(r)] = clock++;
        }
        Status s = p.exact->write(x.data(), static_cast<int64_t>(n), rows.data(), static_cast<int64_t>(rows.size()), {},
                                  staging, positions.data());
        note(s);
        s = p.coded->write(x.data(), static_cast<int64_t>(n), rows.data(), static_cast<int64_t>(rows.size()), {},
                           nullptr, positions.data());
        note(s);
    }

    void fill(Pair& p, Staging& staging) {
        std::vector<int64_t> before;
        std::vector<int64_t> batch;
        for (int64_t r = 0; r < case_.rows; ++r) {
            (r < case_.rows - case_.queries ? before : batch).push_back(r);
        }
        std::vector<int64_t> earlier = before;
        if (case_.overwrite && before.size() > 4 && batch.size() > 2) {
            // The batch writes rows anew that are in the ring, and a row of its own was there before with other values.
            earlier.push_back(batch[0]);
            batch[1] = before[before.size() - 2];
            before_rewritten_ = batch[1];
            earlier.push_back(case_.rows - case_.queries + 1); // the row that the batch now leaves out
        }
        int64_t clock = 0;
        write(p, earlier, &staging, clock);
        // Pins come before the batch, from the staging of what went before.
        for (int64_t r = 0; r < case_.pins && r < static_cast<int64_t>(before.size()); ++r) {
            const Status s = p.exact->pin(r * 2 % static_cast<int64_t>(before.size()), &staging);
            note(s);
        }
        write(p, batch, &staging, clock);
        batch_ = batch;
        const size_t n = static_cast<size_t>(p.exact->shape().row_elements());
        for (int64_t r = 0; r < case_.rows; ++r) {
            const Status s = p.coded->read(r, p.decoded.data() + static_cast<size_t>(r) * n);
            note(s);
        }
    }

    void write_rows() {
        fill(k_, k_staging_);
        if (!is_mla()) {
            fill(v_, v_staging_);
        }
    }

    void make_queries() {
        scale_ = 1 / std::sqrt(static_cast<float>(case_.head_size));
        const int64_t head_stride = case_.head_size + 3;
        const int64_t query_stride = head_stride * n_heads() + 5;
        q_.assign(static_cast<size_t>(query_stride * case_.queries), std::numeric_limits<float>::quiet_NaN());
        for (int64_t i = 0; i < case_.queries; ++i) {
            for (int64_t h = 0; h < n_heads(); ++h) {
                float* q = q_.data() + i * query_stride + h * head_stride;
                const int64_t row = static_cast<int64_t>(random_() % static_cast<uint32_t>(case_.rows));
                const float* key =
                    k_.written.data() + row * k_.exact->shape().row_elements() + h / case_.group * case_.head_size;
                float norm = 0;
                for (int c = 0; c < case_.head_size; ++c) {
                    norm += key[c] * key[c];
                }
                // One row gets a score of 10 to 25, the others' are noise.
                const float part = case_.peaky && norm > 0 ? uniform(10, 25) / (scale_ * norm) : 0.0f;
                for (int c = 0; c < case_.head_size; ++c) {
                    q[c] = (case_.peaky ? 0.5f : 1.0f) * normal() + part * key[c];
                }
            }
        }
        if (case_.sinks) {
            for (int64_t h = 0; h < n_heads(); ++h) {
                sink_logits_.push_back(2 + 2 * normal());
            }
        }
    }

    void make_mask() {
        if (case_.mask == Mask::none) {
            return;
        }
        mask_.assign(static_cast<size_t>(mask_stride() * case_.queries), to_half(7.0f)); // never to be read behind rows
        for (int64_t i = 0; i < case_.queries; ++i) {
            const int64_t own = batch_[static_cast<size_t>(i)];
            for (int64_t r = 0; r < case_.rows; ++r) {
                bool hidden = r > own && !(r == before_rewritten_);
                float bias = 0;
                switch (case_.mask) {
                case Mask::holes: hidden = hidden || random_() % 3 == 0 || r / 64 % 3 == 1 || i % 5 == 4; break;
                case Mask::all_hidden: hidden = true; break;
                case Mask::padded: hidden = r >= case_.rows - case_.rows / 3; break;
                case Mask::biased:
                    hidden = random_() % 4 == 0;
                    bias = -0.03125f * static_cast<float>(random_() % 64);
                    break;
                default: break;
                }
                if (case_.max_bias > 0) {
                    bias -= static_cast<float>(own > r ? own - r : 0);
                }
                mask_[static_cast<size_t>(i * mask_stride() + r)] = hidden ? 0xfc00 : to_half(bias);
            }
        }
    }

    // By the rules of attention.h, from the order of writing alone.
    bool is_exact(const Pair& p, int window, int64_t query, int64_t row) const {
        if (p.exact->is_pinned(row)) {
            return true;
        }
        const int64_t age = p.order[static_cast<size_t>(row)];
        if (!case_.staging) {
            return p.exact->is_exact(row);
        }
        const int64_t own = p.order[static_cast<size_t>(batch_[static_cast<size_t>(query)])];
        return age <= own && age + window > own;
    }

    // One head's row as the query is to see it. An exact row lacks the mantissa bits that a saved row's tag takes.
    std::vector<float> row_seen(const Pair& p, int bits, int window, int64_t query, int64_t row,
                                int64_t kv_head) const {
        const int n = p.exact->shape().row_elements();
        const bool exact = bits <= 8 && n >= kTagElements && is_exact(p, window, query, row);
        const float* from = (exact ? p.written : p.decoded).data() + row * n;
        const int at = static_cast<int>(kv_head) * p.exact->shape().head_size;
        std::vector<float> x(from + at, from + at + p.exact->shape().head_size);
        if (exact) {
            for (int i = at; i < std::min(kTagElements, at + static_cast<int>(x.size())); ++i) {
                float& value = x[static_cast<size_t>(i - at)];
                value = from_half(static_cast<uint16_t>(to_half(value) & ~1U));
            }
        }
        return x;
    }

    Answer attend_one(int64_t query, int64_t head) const {
        const Pair& values = is_mla() ? k_ : v_;
        const int value_bits = is_mla() ? case_.key_bits : case_.value_bits;
        const int value_window = is_mla() ? case_.key_window : case_.value_window;
        const int64_t kv_head = head / case_.group;
        const int64_t head_stride = case_.head_size + 3;
        const float* q = q_.data() + query * (head_stride * n_heads() + 5) + head * head_stride;
        double slope = 1;
        if (case_.max_bias > 0) {
            const int64_t ladder = int64_t{1} << static_cast<int>(std::floor(std::log2(n_heads())));
            slope = head < ladder ? std::pow(std::pow(2.0, -case_.max_bias / static_cast<double>(ladder)), head + 1)
                                  : std::pow(std::pow(2.0, -case_.max_bias / 2 / static_cast<double>(ladder)),
                                             2 * (head - ladder) + 1);
        }
        std::vector<double> score(static_cast<size_t>(case_.rows), -std::numeric_limits<double>::infinity());
        double top = -std::numeric_limits<double>::infinity();
        double reach = 0;
        for (int64_t r = 0; r < case_.rows; ++r) {
            const float bias = mask_.empty() ? 0.0f : from_half(mask_[static_cast<size_t>(query * mask_stride() + r)]);
            if (std::isinf(bias)) {
                continue;
            }
            const std::vector<float> key = row_seen(k_, case_.key_bits, case_.key_window, query, r, kv_head);
            double s = 0;
            for (int c = 0; c < case_.head_size; ++c) {
                s += static_cast<double>(q[c]) * key[static_cast<size_t>(c)];
            }
            s *= scale_;
            if (case_.softcap > 0) {
                s = case_.softcap * std::tanh(s / case_.softcap);
            }
            score[static_cast<size_t>(r)] = s + slope * bias;
            reach = std::max(reach, reach_of(q, key, kv_head));
            top = std::max(top, score[static_cast<size_t>(r)]);
        }
        Answer answer{std::vector<double>(static_cast<size_t>(out_size())), 0, reach};
        std::vector<double> terms(answer.out.size());
        if (std::isinf(top)) {
            return answer;
        }
        double sum = sink_logits_.empty() ? 0.0 : std::exp(sink_logits_[static_cast<size_t>(head)] - top);
        for (int64_t r = 0; r < case_.rows; ++r) {
            const double p = std::exp(score[static_cast<size_t>(r)] - top);
            sum += p;
            const std::vector<float> value = row_seen(values, value_bits, value_window, query, r, kv_head);
            for (size_t c = 0; p > 0 && c < terms.size(); ++c) {
                answer.out[c] += p * value[c];
                terms[c] += p * std::abs(value[c]);
            }
        }
        double squares = 0;
        for (size_t c = 0; c < terms.size(); ++c) {
            answer.out[c] /= sum;
            squares += terms[c] * terms[c];
        }
        answer.terms = std::sqrt(squares) / sum;
        return answer;
    }

    double reach_of(const float* q, const std::vector<float>& key, int64_t kv_head) const {
        const Conditioning& conditioning = k_.exact->conditioning();
        const size_t at = static_cast<size_t>(kv_head * case_.head_size);
        double query_norm = 0;
        double key_norm = 0;
        for (size_t c = 0; c < key.size(); ++c) {
            const double lambda = conditioning.lambda.empty() ? 1.0 : conditioning.lambda[at + c];
            const double mu = conditioning.mu.empty() ? 0.0 : conditioning.mu[at + c];
            query_norm += q[c] / lambda * (q[c] / lambda);
            key_norm += lambda * (key[c] - mu) * (lambda * (key[c] - mu));
        }
        return scale_ * std::sqrt(query_norm * key_norm);
    }

    Case case_;
    std::mt19937 random_;
    Pair k_;
    Pair v_;
    Staging k_staging_;
    Staging v_staging_;
    std::vector<int64_t> batch_;    // rows of the queries
    int64_t before_rewritten_ = -1; // a row of the batch that lies before it
    std::vector<float> q_;
    std::vector<uint16_t> mask_;
    std::vector<float> sink_logits_;
    float scale_ = 1;
    std::string error_;
};

// What may be lost against exact attention over the decoded cache: the integer kernels' 15 and 16-bit terms, else
// the rounding of fp32.
inline constexpr double kIntTolerance = 5e-4;
inline constexpr double kFloatTolerance = 3e-5;
inline constexpr double kReferenceTolerance = 1e-5;

// Runs a case on the instruction sets, and on attend_reference if asked, against the oracle. What went wrong, or "".
inline std::string run_case(const Case& c, const std::vector<Isa>& isas, bool with_reference) {
    std::ostringstream wrong;
    Fixture setup(c);
    if (!setup.error().empty()) {
        return setup.error();
    }
    const auto want = setup.oracle();
    std::vector<float> out;
    const auto judge = [&](const Status& s, std::string_view who, double tolerance) {
        const double error = s.ok() ? setup.worst_error(out, want, tolerance == kIntTolerance) : 0;
        if (!s.ok() || error > tolerance) {
            wrong << who << ": " << (s.ok() ? "error " + std::to_string(error) : s.message()) << " (" << c << ")\n";
        }
    };
    if (with_reference) {
        const AttentionCall call = setup.call(out);
        judge(attend_reference(setup.k(), setup.v(), call), "reference", kReferenceTolerance);
    }
    AttentionWorkspace workspace;
    Threads threads(c.workers);
    for (Isa isa : isas) {
        const AttentionCall call = setup.call(out);
        judge(attend(setup.k(), setup.v(), call, workspace, threads.parallel(), isa), isa_name(isa),
              isa == Isa::portable ? kFloatTolerance : kIntTolerance);
    }
    return wrong.str();
}

inline void check_case(const Case& c, const std::vector<Isa>& isas, bool with_reference = true) {
    EXPECT_EQ(run_case(c, isas, with_reference), "");
}

} // namespace turboquant::attention_tests
