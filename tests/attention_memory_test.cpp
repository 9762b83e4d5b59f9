// Decoding allocates nothing once the workspace has grown. A program of its own: it counts every operator new.
#include "attention_testing.h"

#include <cstdlib>
#include <new>

namespace {
std::atomic<int64_t> allocations{0};

void* counted(size_t bytes, size_t alignment) {
    ++allocations;
    void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (p == nullptr) {
        throw std::bad_alloc();
    }
    return p;
}
} // namespace

void* operator new(size_t bytes) {
    return counted(bytes, alignof(std::max_align_t));
}
void* operator new(size_t bytes, std::align_val_t alignment) {
    return counted(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* p) noexcept {
    std::free(p);
}
void operator delete(void* p, size_t) noexcept {
    std::free(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
    std::free(p);
}
void operator delete(void* p, size_t, std::align_val_t) noexcept {
    std::free(p);
}

namespace turboquant::attention_tests {
namespace {

TEST(AttentionMemory, DecodingAllocatesNothing) {
    for (const Case& c :
         {Case{.rows = 500, .mu = true, .key_window = 32, .value_window = 32, .pins = 4, .staging = true},
          Case{.head_size = 576, .value_size = 512, .kv_heads = 1, .group = 16, .rows = 200, .key_window = 9}}) {
        Fixture setup(c);
        AttentionWorkspace workspace;
        std::vector<float> out;
        for (Isa isa : available_isas()) {
            AttentionCall call = setup.call(out);
            ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
            const int64_t before = allocations;
            for (int64_t rows = c.rows; rows > c.rows - 70; --rows) { // other tile counts too
                call.n_rows = rows;
                ASSERT_TRUE(attend(setup.k(), setup.v(), call, workspace, {}, isa).ok());
            }
            EXPECT_EQ(allocations - before, 0) << isa_name(isa) << " (" << c << ')';
        }
    }
}

} // namespace
} // namespace turboquant::attention_tests
