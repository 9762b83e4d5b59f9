// Random histories of a store against a model that is too simple to be wrong: rows one at a time, lists, no tiles.
#include "cache/store_impl.h"
#include "store_testing.h"

#include <rapidcheck.h>

#include <algorithm>
#include <map>
#include <numeric>

namespace turboquant {
namespace {

using testing::make_store;
using testing::native_row;
using testing::normals;
using testing::read_row;

constexpr int64_t kRows = 150;

struct Exact {
    int64_t row;
    std::vector<uint16_t> halves;
    uint64_t age;
};

// The promises of store.h, literally.
struct Model {
    int window;
    int sinks;
    int elements;
    uint64_t clock = 0;
    std::vector<Exact> ring;      // oldest first
    std::vector<Exact> pinned;    // longest pinned first
    std::unique_ptr<Store> codes; // a store without exact rows

    static void forget(std::vector<Exact>& list, int64_t row) {
        list.erase(std::remove_if(list.begin(), list.end(), [row](const Exact& e) { return e.row == row; }),
                   list.end());
    }
    const Exact* find(const std::vector<Exact>& list, int64_t row) const {
        const auto at = std::find_if(list.begin(), list.end(), [row](const Exact& e) { return e.row == row; });
        return at == list.end() ? nullptr : &*at;
    }
    Exact* find(std::vector<Exact>& list, int64_t row) {
        return const_cast<Exact*>(static_cast<const Model*>(this)->find(list, row));
    }
    static std::vector<uint16_t> halves(const std::vector<float>& x) {
        std::vector<uint16_t> h(x.size());
        std::transform(x.begin(), x.end(), h.begin(), to_half);
        return h;
    }

    void write(int64_t row, const std::vector<float>& x) {
        RC_ASSERT(testing::write_rows(*codes, x, {row}).ok());
        forget(ring, row);
        forget(pinned, row);
        ring.push_back({row, halves(x), ++clock});
        if (ring.size() > static_cast<size_t>(window)) {
            ring.erase(ring.begin());
        }
    }
    bool pin(int64_t row) {
        if (sinks == 0 || find(pinned, row) != nullptr) {
            return true;
        }
        const Exact* const e = find(ring, row);
        if (e == nullptr) {
            return false;
        }
        const Exact moved = *e;
        forget(ring, row);
        if (pinned.size() == static_cast<size_t>(sinks)) {
            pinned.erase(pinned.begin());
        }
        pinned.push_back(moved);
        return true;
    }
    void rewrite(int64_t row, const std::vector<float>& x) {
        RC_ASSERT(codes->rewrite(row, x.data()).ok());
        for (auto* list : {&ring, &pinned}) {
            if (Exact* const e = find(*list, row)) {
                e->halves = halves(x);
            }
        }
    }
    void clear_row(int64_t row) {
        bool not_native = true;
        const std::vector<uint8_t> zeros(codes->native_row_bytes(), 0);
        RC_ASSERT(codes->write_native(row, zeros.data(), not_native).ok());
        forget(ring, row);
        forget(pinned, row);
    }
};

void compare(const Store& store, const Model& model) {
    const Store::Impl& a = store.impl();
    const Store::Impl& b = model.codes->impl();
    RC_ASSERT(std::equal(a.codes.data(), a.codes.data() + a.codes.size(), b.codes.data()));
    RC_ASSERT(std::equal(a.scales.data(), a.scales.data() + a.scales.size(), b.scales.data()));
    RC_ASSERT(a.clock == model.clock);
    RC_ASSERT(a.n_ring == static_cast<int>(model.ring.size()));
    RC_ASSERT(a.n_pinned == static_cast<int>(model.pinned.size()));
    for (int64_t row = 0; row < kRows; ++row) {
        const Exact* const pinned = model.find(model.pinned, row);
        const Exact* const exact = pinned != nullptr ? pinned : model.find(model.ring, row);
        RC_ASSERT(store.is_exact(row) == (exact != nullptr));
        RC_ASSERT(store.is_pinned(row) == (pinned != nullptr));
        RC_ASSERT(store.is_written(row) == model.codes->is_written(row));
        if (exact == nullptr) {
            RC_ASSERT(read_row(store, row) == read_row(*model.codes, row));
            continue;
        }
        const int slot = a.find_slot(row);
        RC_ASSERT(a.slot_age[static_cast<size_t>(slot)] == exact->age);
        for (size_t i = 0; i < exact->halves.size(); ++i) {
            const unsigned ignored = i < 64 ? 1U : 0U; // the tag's bit
            RC_ASSERT((a.raw(slot)[i] | ignored) == (exact->halves[i] | ignored));
        }
    }
}

TEST(StoreModel, AnyHistory) {
    EXPECT_TRUE(rc::check([] {
        const StoreShape shape = {*rc::gen::element(Side::key, Side::value), *rc::gen::element(32, 64, 80),
                                  *rc::gen::inRange(1, 4), kRows};
        RC_PRE(shape.row_elements() >= 64);
        const int bits = *rc::gen::element(2, 3, 4, 5, 6, 8);
        Model model;
        model.window = *rc::gen::element(0, 1, 3, 8);
        model.sinks = *rc::gen::element(0, 1, 3);
        model.elements = shape.row_elements();
        model.codes = make_store(shape, {bits, 0, 0});
        const auto store = make_store(shape, {bits, model.window, model.sinks});
        testing::ThreadPool pool;
        pool.n_threads = 2;
        Staging staging;
        const int steps = *rc::gen::inRange(1, 80);
        for (int step = 0; step < steps; ++step) {
            const int64_t row = *rc::gen::inRange<int64_t>(0, kRows);
            const auto seed = static_cast<uint32_t>(step * 1000) + static_cast<uint32_t>(row);
            const std::vector<float> x = normals(static_cast<size_t>(model.elements), seed);
            switch (*rc::gen::weightedElement<int>({{6, 0}, {2, 1}, {4, 2}, {2, 3}, {1, 4}, {1, 5}, {1, 6}})) {
            case 0: // one row
                RC_ASSERT(testing::write_rows(*store, x, {row}).ok());
                model.write(row, x);
                break;
            case 1: { // a batch in any order, longer or shorter than the window
                std::vector<int64_t> all(kRows);
                std::iota(all.begin(), all.end(), 0);
                std::mt19937 generator(seed);
                std::shuffle(all.begin(), all.end(), generator);
                all.resize(static_cast<size_t>(*rc::gen::inRange(1, 40)));
                const std::vector<float> rows = normals(all.size() * static_cast<size_t>(model.elements), seed);
                RC_ASSERT(testing::write_rows(*store, rows, all, seed % 2 == 0 ? &staging : nullptr,
                                              seed % 3 == 0 ? pool.parallel() : ParallelFor())
                              .ok());
                for (size_t i = 0; i < all.size(); ++i) {
                    const auto at = rows.begin() + static_cast<ptrdiff_t>(i * static_cast<size_t>(model.elements));
                    model.write(all[i], {at, at + model.elements});
                }
                break;
            }
            case 2: { // pin what is exact, mostly
                const bool any = !model.ring.empty() && seed % 4 != 0;
                const int64_t target = any ? model.ring[seed % model.ring.size()].row : row;
                RC_ASSERT(store->pin(target, nullptr).ok() == model.pin(target));
                break;
            }
            case 3:
                RC_ASSERT(store->rewrite(row, x.data()).ok());
                model.rewrite(row, x);
                break;
            case 4: { // out and in again: nothing changes but the order of pins
                const std::vector<uint8_t> saved = native_row(*store, row);
                bool not_native = true;
                RC_ASSERT(store->write_native(row, saved.data(), not_native).ok());
                RC_ASSERT(!not_native);
                if (const Exact* const e = model.find(model.pinned, row)) {
                    const Exact moved = *e;
                    Model::forget(model.pinned, row);
                    model.pinned.push_back(moved);
                }
                break;
            }
            case 5: {
                const std::vector<uint8_t> zeros(store->native_row_bytes(), 0);
                bool not_native = true;
                RC_ASSERT(store->write_native(row, zeros.data(), not_native).ok());
                model.clear_row(row);
                break;
            }
            default:
                if (seed % 5 == 0) {
                    store->clear();
                    model.codes->clear();
                    model.ring.clear();
                    model.pinned.clear();
                    model.clock = 0;
                }
                break;
            }
            compare(*store, model);
        }
        const auto copy = make_store(shape, {bits, model.window, model.sinks});
        RC_ASSERT(copy->copy_from(*store).ok());
        compare(*copy, model);
    }));
}

} // namespace
} // namespace turboquant
