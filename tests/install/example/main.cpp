// A program of somebody else that uses libturboquant: 4-bit keys and values, and attention over them.
#include <turboquant/attention.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace tq = turboquant;

static void check(const tq::Status& status) {
    if (!status.ok()) {
        std::fprintf(stderr, "%s\n", status.message().c_str());
        std::exit(1);
    }
}

int main() {
    constexpr int kHead = 128;
    constexpr int64_t kRows = 512;

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> k(kRows * kHead), v(kRows * kHead), q(kHead), out(kHead);
    for (auto* x : {&k, &v, &q}) {
        for (float& value : *x) {
            value = normal(random);
        }
    }
    std::vector<int64_t> index(kRows);
    std::iota(index.begin(), index.end(), 0);

    std::unique_ptr<tq::Store> keys, values;
    check(tq::Store::create({tq::Side::key, kHead, 1, kRows}, {4}, {}, keys));
    check(tq::Store::create({tq::Side::value, kHead, 1, kRows}, {4}, {}, values));
    check(keys->write(k.data(), kHead, index.data(), kRows, {}, nullptr));
    check(values->write(v.data(), kHead, index.data(), kRows, {}, nullptr));

    tq::AttentionCall call;
    call.q = q.data();
    call.q_query_stride = call.q_head_stride = kHead;
    call.n_queries = call.n_heads = 1;
    call.n_rows = kRows;
    call.scale = 1 / std::sqrt(static_cast<float>(kHead));
    call.out = out.data();
    call.out_query_stride = call.out_head_stride = kHead;
    tq::Isa isa = tq::Isa::portable;
    check(tq::default_isa(isa));
    tq::AttentionWorkspace workspace;
    check(tq::attend(*keys, *values, call, workspace, {}, isa));

    // The same with nothing compressed.
    std::vector<double> exact(kHead);
    double sum = 0;
    for (int64_t r = 0; r < kRows; ++r) {
        const double dot = std::inner_product(q.begin(), q.end(), k.begin() + r * kHead, 0.0);
        const double weight = std::exp(dot * call.scale);
        sum += weight;
        for (int c = 0; c < kHead; ++c) {
            exact[c] += weight * v[r * kHead + c];
        }
    }
    double error = 0, norm = 0;
    for (int c = 0; c < kHead; ++c) {
        exact[c] /= sum;
        error += (out[c] - exact[c]) * (out[c] - exact[c]);
        norm += exact[c] * exact[c];
    }
    error = std::sqrt(error / norm);
    const size_t bytes = keys->bytes() + values->bytes();
    const size_t bytes_f16 = 2 * sizeof(uint16_t) * kRows * kHead;
    std::printf("%zu bytes for %zu in f16, relative error of the attention %.3f\n", bytes, bytes_f16, error);
    return bytes < bytes_f16 / 3 && error < 0.25 ? 0 : 1;
}
