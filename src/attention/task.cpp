// What a task of attend() does, the same for all instruction sets. The arithmetic is in the kernels.
#include "attention/task.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace turboquant::attention {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One task at work: the state that its steps share.
class Task {
public:
    Task(const Job& job, Scratch& s, int kv_head, int64_t first, int count, Sums sums)
        : plan_(job.plan),
          call_(*job.plan.call),
          kernels_(*job.plan.kernels),
          job_(job),
          s_(s),
          kv_head_(kv_head),
          first_(first),
          count_(count),
          sums_(sums),
          first_query_(first / job.plan.group),
          n_queries_(static_cast<int>((first + count - 1) / job.plan.group - first_query_ + 1)) {}

    void run(const int32_t* tiles, int64_t n_tiles) {
        load_queries();
        for (int m = 0; m < count_; ++m) {
            sums_.row[m] = {-kInfinity, 0, 0, 0, 1};
        }
        const size_t floats = static_cast<size_t>(count_) * static_cast<size_t>(plan_.value_ld);
        std::fill_n(sums_.coded, floats, 0.0f);
        if (!job_.exact_values.empty()) {
            std::fill_n(sums_.exact, floats, 0.0f);
        }
        for (int64_t i = 0; i < n_tiles; ++i) {
            const int64_t tile = tiles[i];
            stored_tile_ = call_.tiles != nullptr ? call_.tiles[tile] : tile;
            look(tile);
            score(tile);
            if (weigh()) {
                add_values(tile);
            }
        }
    }

private:
    int query_of(int m) const { return static_cast<int>((first_ + m) / plan_.group - first_query_); }
    int head_of(int m) const { return kv_head_ * plan_.group + static_cast<int>((first_ + m) % plan_.group); }
    int first_entry_of(int query) const {
        return static_cast<int>(std::max<int64_t>(0, (first_query_ + query) * plan_.group - first_));
    }
    int end_entry_of(int query) const {
        return static_cast<int>(std::min<int64_t>(count_, (first_query_ + query + 1) * plan_.group - first_));
    }

    // Calls body(first entry, count) for each run of entries whose queries see something of the tile.
    template <class Body>
    void for_seeing_runs(Body&& body) const {
        for (int i = 0; i < n_queries_;) {
            if (s_.sight[i] == Sight::hidden) {
                ++i;
                continue;
            }
            const int begin = i;
            while (i < n_queries_ && s_.sight[i] != Sight::hidden) {
                ++i;
            }
            const int first = first_entry_of(begin);
            body(first, end_entry_of(i - 1) - first);
        }
    }

    // Calls body(first entry, count) for each run of entries that have probabilities in the tile.
    template <class Body>
    void for_live_runs(Body&& body) const {
        for_runs([&](int m) { return s_.live[m] != 0; }, body);
    }

    // Calls body(first entry, count) for each run of entries that `wanted` is true of.
    template <class Wanted, class Body>
    void for_runs(Wanted&& wanted, Body&& body) const {
        for (int m = 0; m < count_; ++m) {
            const int begin = m;
            while (m < count_ && wanted(m)) {
                ++m;
            }
            if (m > begin) {
                body(begin, m - begin);
            }
        }
    }

    // Calls body(first entry, count) for even portions of n entries, as many at once as the integer kernels take.
    template <class Body>
    void for_portions(int first, int n, Body&& body) const {
        const int portions = (n + kernels_.max_heads - 1) / kernels_.max_heads;
        for (int i = 0; i < portions; ++i) {
            const int begin = n * i / portions;
            body(first + begin, n * (i + 1) / portions - begin);
        }
    }

    void load_queries();
    void look(int64_t tile);
    void score(int64_t tile);
    void set_means(int64_t tile);
    void add_exact_scores();
    template <class Entry>
    void set_means(int64_t tile, const Entry* entries);
    void add_turning_means(int64_t tile);
    bool weigh();
    void add_values(int64_t tile);
    void rescale_coded(int first, int n);
    void add_exact_values();
    bool find_exact(const ExactRows& rows, int64_t tile, int head_size);
    void load_key_tile(const Store::Impl& store, const LevelTables& tables, int64_t tile, float* out);
    void load_value_tile(int64_t tile);
    void load_scales(const Store::Impl& store, int64_t tile, int block);

    const Plan& plan_;
    const AttentionCall& call_;
    const Kernels& kernels_;
    const Job& job_;
    Scratch& s_;
    const int kv_head_;
    const int64_t first_;
    const int count_;
    const Sums sums_;
    const int64_t first_query_;
    const int n_queries_;
    int n_exact_ = 0;         // rows in exact_rows
    bool seen_known_ = false; // s_.seen is of this tile
    int64_t stored_tile_ = 0; // where the stores have the tile at hand
};

void Task::load_queries() {
    const Store::Impl& k = *plan_.k;
    const int d = plan_.key_size;
    const size_t head_offset = static_cast<size_t>(kv_head_) * static_cast<size_t>(d);
    const Conditioner& conditioner = k.conditioner;
    const std::vector<float>& lambdas = conditioner.conditioning().lambda;
    const float* lambda = lambdas.empty() ? nullptr : lambdas.data() + head_offset;
    const int n_pairs = plan_.turning_mean ? conditioner.n_pairs() : 0;
    const float* pair_mean = n_pairs > 0 ? conditioner.pair_mean(kv_head_) : nullptr;
    s_.mean_entry = -1;
    for (int m = 0; m < count_; ++m) {
        const float* q = call_.q + (first_ + m) / plan_.group * call_.q_query_stride + head_of(m) * call_.q_head_stride;
        float* rotated = s_.query + static_cast<size_t>(m) * static_cast<size_t>(d);
        float* plain =
            job_.exact_keys.empty() ? s_.vector : s_.plain_query + static_cast<size_t>(m) * static_cast<size_t>(d);
        for (int c = 0; c < d; ++c) {
            plain[c] = q[c] * plan_.query_factor;
        }
        s_.constant_mean[m] =
            plan_.key_mean ? kernels_.dot(plain, conditioner.constant_mean().data() + head_offset, d) : 0.0f;
        s_.query_mean[m] = s_.constant_mean[m];
        // <q, turned mean> = cos(phase) <q, mean> + sin(phase) <q, mean a quarter turn on>, pair by pair.
        float* turning = s_.turning_query + static_cast<int64_t>(m) * 2 * n_pairs;
        for (int i = 0; i < n_pairs; ++i) {
            const RopePair& pair = conditioner.pairs()[static_cast<size_t>(i)];
            const float first = pair_mean[i];
            const float second = pair_mean[n_pairs + i];
            turning[i] = plain[pair.first] * first + plain[pair.second] * second;
            turning[n_pairs + i] = plain[pair.second] * first - plain[pair.first] * second;
        }
        if (k.book == nullptr) {
            std::copy_n(plain, d, rotated);
            continue;
        }
        if (lambda == nullptr) {
            k.rotation.forward(plain, rotated);
        } else {
            for (int c = 0; c < d; ++c) {
                rotated[c] = plain[c] / lambda[c];
            }
            k.rotation.forward(rotated, rotated);
        }
        if (plan_.int_keys) {
            kernels_.quantise_query(rotated, d, s_.query_words + static_cast<int64_t>(m) * s_.query_words_ld,
                                    s_.query_mul + m, s_.query_sum + m);
        }
    }
}

// What the task's queries see of a tile, and the mask where that takes it.
void Task::look(int64_t tile) {
    const int64_t row = tile * kTileRows;
    const int valid = static_cast<int>(std::min<int64_t>(kTileRows, call_.n_rows - row));
    seen_known_ = false;
    n_exact_ = 0;
    for (int i = 0; i < n_queries_; ++i) {
        s_.sight[i] = job_.visibility.sight(first_query_ + i, tile);
        if (s_.sight[i] == Sight::mixed) {
            float* bias = s_.bias + i * kTileRows;
            if (call_.mask == nullptr) {
                std::fill_n(bias, valid, 0.0f);
            } else {
                kernels_.half_to_float(call_.mask + (first_query_ + i) * call_.mask_query_stride + row, bias, valid);
            }
            std::fill(bias + valid, bias + kTileRows, -kInfinity);
            if (call_.ranges != nullptr) {
                const RowRange& range = call_.ranges[first_query_ + i];
                std::fill(bias, bias + std::clamp<int64_t>(range.begin - row, 0, valid), -kInfinity);
                std::fill(bias + std::clamp<int64_t>(range.end - row, 0, valid), bias + valid, -kInfinity);
            }
        }
    }
}

void Task::load_scales(const Store::Impl& store, int64_t tile, int block) {
    kernels_.half_to_float(store.tile_scales(kv_head_, tile) + block * kTileRows, s_.scale, kTileRows);
}

// out[channel][64]: keys of all channels as the codes (or pass-through rows) have them.
void Task::load_key_tile(const Store::Impl& store, const LevelTables& tables, int64_t tile, float* out) {
    const int d = store.shape.head_size;
    if (store.book != nullptr) {
        kernels_.unpack_key(store.tile, store.tile_codes(kv_head_, tile), s_.bytes);
        int b = 0;
        for (const RotationBlock& block : store.rotation.blocks()) {
            load_scales(store, tile, b++);
            const int64_t at = static_cast<int64_t>(block.offset) * kTileRows;
            kernels_.expand_key(s_.bytes + at, block.size, tables.level, s_.scale, out + at);
        }
        return;
    }
    const size_t first =
        (static_cast<size_t>(kv_head_) * static_cast<size_t>(store.n_tiles) + static_cast<size_t>(tile)) * kTileRows *
        static_cast<size_t>(d);
    if (store.options.bits == 32) {
        kernels_.transpose(reinterpret_cast<const float*>(store.plain.data()) + first, kTileRows, d, d, out, kTileRows);
        return;
    }
    const uint16_t* rows = reinterpret_cast<const uint16_t*>(store.plain.data()) + first;
    constexpr int kAtOnce = 16;
    for (int r = 0; r < kTileRows; r += kAtOnce) {
        float* row = reinterpret_cast<float*>(s_.bytes); // d * 64 bytes: 16 rows of floats
        kernels_.half_to_float(rows + static_cast<size_t>(r) * static_cast<size_t>(d), row, kAtOnce * d);
        kernels_.transpose(row, kAtOnce, d, d, out + r, kTileRows);
    }
}

// Keys that serve as values: each row's mean, in the codes' rotated basis, on top of what its codes say.
void Task::add_turning_means(int64_t tile) {
    const Store::Impl& v = *plan_.v;
    const int d = v.shape.head_size;
    const size_t at = static_cast<size_t>(kv_head_) * static_cast<size_t>(d);
    const std::vector<float>& lambda = v.conditioner.conditioning().lambda;
    const int64_t first = stored_tile_ * kTileRows;
    const int valid = static_cast<int>(std::min<int64_t>(kTileRows, call_.n_rows - tile * kTileRows));
    float* mean = s_.vector;
    for (int r = 0; r < valid; ++r) {
        if (r == 0 || v.row_entry(first + r) != v.row_entry(first + r - 1)) {
            v.conditioner.head_mean(kv_head_, v.row_entry(first + r), mean);
            for (int c = 0; !lambda.empty() && c < d; ++c) {
                mean[c] *= lambda[at + static_cast<size_t>(c)];
            }
            v.rotation.forward(mean, mean);
        }
        kernels_.axpy(1, mean, s_.value_tile + static_cast<int64_t>(r) * plan_.value_ld, plan_.sum_size);
    }
}

void Task::load_value_tile(int64_t tile) {
    const Store::Impl& v = *plan_.v;
    const int ld = plan_.value_ld;
    if (plan_.keyed_values) {
        const float* keys = s_.key_tile;
        if (!plan_.shared_tile) {
            load_key_tile(v, *job_.value_tables, stored_tile_, s_.keyed_value_tile);
            keys = s_.keyed_value_tile;
        }
        kernels_.transpose(keys, plan_.sum_size, kTileRows, kTileRows, s_.value_tile, ld);
        if (plan_.turning_values) {
            add_turning_means(tile);
        }
        return;
    }
    const int d = v.shape.head_size;
    if (v.book != nullptr) {
        const int bytes_ld = round_up(d, 16);
        kernels_.unpack_value(v.tile, v.tile_codes(kv_head_, stored_tile_), s_.bytes, bytes_ld);
        int b = 0;
        for (const RotationBlock& block : v.rotation.blocks()) {
            if (block.offset < plan_.sum_size) {
                load_scales(v, stored_tile_, b);
                kernels_.expand_value(s_.bytes + block.offset, block.size, bytes_ld, job_.value_tables->level, s_.scale,
                                      s_.value_tile + block.offset, ld);
            }
            ++b;
        }
        return;
    }
    const size_t first =
        (static_cast<size_t>(kv_head_) * static_cast<size_t>(v.n_tiles) + static_cast<size_t>(stored_tile_)) *
        kTileRows * static_cast<size_t>(d);
    for (int r = 0; r < kTileRows; ++r) {
        const size_t at = first + static_cast<size_t>(r) * static_cast<size_t>(d);
        float* row = s_.value_tile + static_cast<int64_t>(r) * ld;
        if (v.options.bits == 32) {
            std::copy_n(reinterpret_cast<const float*>(v.plain.data()) + at, plan_.sum_size, row);
        } else {
            kernels_.half_to_float(reinterpret_cast<const uint16_t*>(v.plain.data()) + at, row, plan_.sum_size);
        }
    }
}

// exact_bits, exact_rows, exact_at: rows of the tile that are exact for some query which sees them. False: its queries
// see no others, so that its codes need not be read.
bool Task::find_exact(const ExactRows& rows, int64_t tile, int head_size) {
    n_exact_ = 0;
    const int64_t first_row = tile * kTileRows;
    const size_t begin = rows.first_at_or_after(first_row);
    const size_t end = rows.first_at_or_after(first_row + kTileRows);
    if (begin == end) {
        return true;
    }
    if (!seen_known_) {
        seen_known_ = true;
        for (int i = 0; i < n_queries_; ++i) {
            uint64_t seen = s_.sight[i] == Sight::clear ? ~uint64_t{0} : 0;
            for (int r = 0; s_.sight[i] == Sight::mixed && r < kTileRows; ++r) {
                seen |= static_cast<uint64_t>(s_.bias[i * kTileRows + r] != -kInfinity) << r;
            }
            s_.seen[i] = seen;
        }
    }
    uint64_t wanted = 0;
    bool coded = false;
    for (int i = 0; i < n_queries_; ++i) {
        s_.exact_bits[i] = s_.seen[i] == 0 ? 0 : rows.bits(begin, end, first_row, first_query_ + i) & s_.seen[i];
        wanted |= s_.exact_bits[i];
        coded |= s_.exact_bits[i] != s_.seen[i];
    }
    for (size_t e = begin; e < end; ++e) {
        const auto r = static_cast<int>(rows[e].row - first_row);
        if ((wanted >> r & 1) != 0) {
            s_.exact_at[n_exact_] = static_cast<uint8_t>(r);
            s_.exact_rows[n_exact_++] = rows[e].raw + static_cast<int64_t>(kv_head_) * head_size;
        }
    }
    return coded;
}

// query_mean for the tile's rows; where they are of several blocks it is added to the scores here and now.
void Task::set_means(int64_t tile) {
    const Store::Impl& k = *plan_.k;
    if (k.entry_size == 1) {
        set_means(tile, k.tile_entries<uint8_t>(stored_tile_));
    } else {
        set_means(tile, k.tile_entries<uint16_t>(stored_tile_));
    }
}

template <class Entry>
void Task::set_means(int64_t tile, const Entry* entries) {
    const Conditioner& conditioner = plan_.k->conditioner;
    const int n = 2 * conditioner.n_pairs();
    const int valid = static_cast<int>(std::min<int64_t>(kTileRows, call_.n_rows - tile * kTileRows));
    // Each like its neighbour: all alike.
    const bool alike = std::memcmp(entries, entries + 1, static_cast<size_t>(valid - 1) * sizeof(Entry)) == 0;
    const auto mean_of = [&](int m, int entry) {
        return s_.constant_mean[m] +
               kernels_.dot(s_.turning_query + static_cast<int64_t>(m) * n, conditioner.phases(entry), n);
    };
    if (alike) {
        if (s_.mean_entry != entries[0]) {
            s_.mean_entry = entries[0];
            for (int m = 0; m < count_; ++m) {
                s_.query_mean[m] = mean_of(m, s_.mean_entry);
            }
        }
        return;
    }
    s_.mean_entry = -1;
    Entry found[kTileRows];
    uint8_t which[kTileRows] = {};
    int n_found = 0;
    for (int r = 0; r < valid; ++r) {
        int i = r > 0 && entries[r] == entries[r - 1] ? which[r - 1] : 0;
        while (i < n_found && found[i] != entries[r]) {
            ++i;
        }
        if (i == n_found) {
            found[n_found++] = entries[r];
        }
        which[r] = static_cast<uint8_t>(i);
    }
    for (int m = 0; m < count_; ++m) {
        s_.query_mean[m] = 0;
        if (s_.sight[query_of(m)] == Sight::hidden) {
            continue;
        }
        float mean[kTileRows];
        for (int i = 0; i < n_found; ++i) {
            mean[i] = mean_of(m, found[i]);
        }
        float* scores = s_.scores + m * kTileRows;
        for (int r = 0; r < valid; ++r) {
            scores[r] += mean[which[r]];
        }
    }
}

void Task::add_exact_scores() {
    const auto wanted = [&](int m) { return s_.exact_bits[query_of(m)] != 0; };
    for_runs(wanted, [&](int first, int n) {
        const auto at = static_cast<int64_t>(first) * plan_.key_size;
        kernels_.exact_scores(s_.exact_rows, n_exact_, plan_.key_size, s_.plain_query + at, plan_.key_size, n,
                              s_.exact_scores + first * kTileRows);
        for (int m = first; m < first + n; ++m) {
            const uint64_t bits = s_.exact_bits[query_of(m)];
            for (int j = 0; j < n_exact_; ++j) {
                if ((bits >> s_.exact_at[j] & 1) != 0) {
                    // Less the mean's part, which every row of the tile gets added later.
                    s_.scores[m * kTileRows + s_.exact_at[j]] = s_.exact_scores[m * kTileRows + j] - s_.query_mean[m];
                }
            }
        }
    });
}

void Task::score(int64_t tile) {
    const Store::Impl& k = *plan_.k;
    const bool coded = job_.exact_keys.empty() || find_exact(job_.exact_keys, tile, plan_.key_size);
    if (!coded) {
        std::fill_n(s_.scores, count_ * kTileRows, 0.0f); // of rows that nobody sees
    } else if (plan_.int_keys) {
        for_seeing_runs([&](int first, int n) {
            for_portions(first, n, [&](int m, int heads) {
                kernels_.int_scores(k.tile, *job_.key_tables, k.tile_codes(kv_head_, stored_tile_),
                                    k.tile_scales(kv_head_, stored_tile_),
                                    s_.query_words + static_cast<int64_t>(m) * s_.query_words_ld, s_.query_words_ld,
                                    s_.query_mul + m, s_.query_sum + m, heads, s_.scores + m * kTileRows);
            });
        });
    } else {
        load_key_tile(k, *job_.key_tables, stored_tile_, s_.key_tile);
        for_seeing_runs([&](int first, int n) {
            kernels_.gemm(s_.query + static_cast<int64_t>(first) * plan_.key_size, plan_.key_size, s_.key_tile,
                          kTileRows, s_.scores + first * kTileRows, kTileRows, n, kTileRows, plan_.key_size, false);
        });
    }
    if (plan_.turning_mean) { // also without codes: how an exact score is rounded must not depend on other queries
        set_means(tile);
    }
    if (n_exact_ > 0) {
        add_exact_scores();
    }
}

// Scores to probabilities. False: nobody has any to add.
bool Task::weigh() {
    bool any = false;
    for (int m = 0; m < count_; ++m) {
        const int i = query_of(m);
        bool live = false;
        sums_.row[m].rescale = 1;
        if (s_.sight[i] != Sight::hidden) {
            const float* bias = s_.sight[i] == Sight::mixed ? s_.bias + i * kTileRows : nullptr;
            constexpr float kLog2E = 1.44269504088896340736f;
            const float slope = alibi_slope(head_of(m), call_.n_heads, call_.max_bias) * kLog2E;
            live = kernels_.softmax(s_.scores + m * kTileRows, s_.query_mean[m], plan_.softcap_factor, bias, slope,
                                    sums_.row[m]);
        }
        s_.live[m] = live;
        any |= live;
    }
    return any;
}

// Adds the exact rows' values and takes their probabilities out of the codes' share.
void Task::add_exact_values() {
    const auto wanted = [&](int m) { return s_.live[m] != 0 && s_.exact_bits[query_of(m)] != 0; };
    for_runs(wanted, [&](int first, int n) {
        for (int m = first; m < first + n; ++m) {
            const uint64_t bits = s_.exact_bits[query_of(m)];
            float* p = s_.scores + m * kTileRows;
            for (int j = 0; j < n_exact_; ++j) {
                const int r = s_.exact_at[j];
                const bool exact = (bits >> r & 1) != 0;
                s_.exact_scores[m * kTileRows + j] = exact ? p[r] : 0.0f;
                p[r] = exact ? 0.0f : p[r];
            }
        }
        kernels_.exact_values(s_.exact_rows, n_exact_, plan_.value_size, s_.exact_scores + first * kTileRows, n,
                              sums_.exact + static_cast<int64_t>(first) * plan_.value_ld, plan_.value_ld);
    });
}

void Task::rescale_coded(int first, int n) {
    for (int m = first; m < first + n; ++m) {
        if (sums_.row[m].rescale != 1) {
            kernels_.scale(sums_.row[m].rescale, sums_.coded + static_cast<int64_t>(m) * plan_.value_ld,
                           plan_.sum_size);
        }
    }
}

void Task::add_values(int64_t tile) {
    const Store::Impl& v = *plan_.v;
    const ExactRows& rows = job_.exact_values;
    const int ld = plan_.value_ld;
    if (!rows.empty()) {
        for (int m = 0; m < count_; ++m) {
            if (sums_.row[m].rescale != 1) {
                kernels_.scale(sums_.row[m].rescale, sums_.exact + static_cast<int64_t>(m) * ld, plan_.value_size);
            }
        }
        const bool coded = find_exact(rows, tile, v.shape.head_size);
        if (n_exact_ > 0) {
            add_exact_values();
        }
        if (!coded) {
            rescale_coded(0, count_);
            return;
        }
    }
    for (int m = 0; m < count_ && plan_.value_mean; ++m) {
        const float* p = s_.scores + m * kTileRows;
        for (int r = 0; s_.live[m] != 0 && r < kTileRows; ++r) {
            sums_.row[m].code_sum += p[r];
        }
    }
    if (plan_.int_values) {
        for_live_runs([&](int first, int n) {
            for (int m = first; m < first + n; ++m) {
                s_.rescale[m] = sums_.row[m].rescale;
                kernels_.quantise_weights(s_.scores + m * kTileRows, v.tile_scales(kv_head_, stored_tile_),
                                          s_.weight_words + m * (kTileRows / 4), s_.weight_mul + m, s_.weight_sum + m);
            }
            for_portions(first, n, [&](int m, int heads) {
                kernels_.int_values(v.tile, *job_.value_tables, v.tile_codes(kv_head_, stored_tile_),
                                    s_.weight_words + m * (kTileRows / 4), s_.weight_mul + m, s_.weight_sum + m,
                                    s_.rescale + m, heads, sums_.coded + static_cast<int64_t>(m) * ld, ld);
            });
        });
        return;
    }
    load_value_tile(tile);
    for_live_runs([&](int first, int n) {
        rescale_coded(first, n);
        kernels_.gemm(s_.scores + first * kTileRows, kTileRows, s_.value_tile, ld,
                      sums_.coded + static_cast<int64_t>(first) * ld, ld, n, ld, kTileRows, true);
    });
}

} // namespace

void run_tiles(const Job& job, Scratch& scratch, int kv_head, int64_t first, int count, Sums sums, const int32_t* tiles,
               int64_t n_tiles) {
    Task(job, scratch, kv_head, first, count, sums).run(tiles, n_tiles);
}

void finish(const Job& job, Scratch& s, int kv_head, int64_t entry, const Sums* parts, int64_t n_parts, int64_t index) {
    const Plan& plan = job.plan;
    const AttentionCall& call = *plan.call;
    const int head = kv_head * plan.group + static_cast<int>(entry % plan.group);
    float* out = call.out + entry / plan.group * call.out_query_stride + head * call.out_head_stride;
    float top = -kInfinity;
    for (int64_t i = 0; i < n_parts; ++i) {
        top = std::max(top, parts[i].row[index].max);
    }
    std::fill_n(out, plan.value_size, 0.0f);
    if (top == -kInfinity) {
        return;
    }
    float sum = 0;
    if (call.sink_logits != nullptr) {
        constexpr float kLog2E = 1.44269504088896340736f;
        const float logit = call.sink_logits[head] * kLog2E;
        top = std::max(top, logit);
        sum = std::exp2(logit - top);
    }
    const Store::Impl& v = *plan.v;
    const int d = v.shape.head_size;
    const bool has_exact = !job.exact_values.empty();
    float* coded = s.vector;
    std::fill_n(coded, d, 0.0f);
    float code_sum = 0;
    for (int64_t i = 0; i < n_parts; ++i) {
        const RowState& row = parts[i].row[index];
        if (row.max == -kInfinity) {
            continue;
        }
        const float weight = std::exp2(row.max - top);
        sum += weight * row.sum;
        code_sum += weight * row.code_sum;
        plan.kernels->axpy(weight, parts[i].coded + index * plan.value_ld, coded, plan.sum_size);
        if (has_exact) {
            plan.kernels->axpy(weight, parts[i].exact + index * plan.value_ld, out, plan.value_size);
        }
    }
    const size_t at = static_cast<size_t>(kv_head) * static_cast<size_t>(d);
    if (v.book != nullptr) {
        v.rotation.inverse(coded, coded);
        const Conditioning& conditioning = v.conditioner.conditioning();
        if (!conditioning.lambda.empty()) {
            for (int c = 0; c < plan.value_size; ++c) {
                coded[c] /= conditioning.lambda[at + static_cast<size_t>(c)];
            }
        }
        if (plan.value_mean) {
            plan.kernels->axpy(code_sum, v.conditioner.constant_mean().data() + at, coded, plan.value_size);
        }
    }
    const float inverse = 1 / sum;
    for (int c = 0; c < plan.value_size; ++c) {
        out[c] = (out[c] + coded[c]) * inverse;
    }
}

} // namespace turboquant::attention
