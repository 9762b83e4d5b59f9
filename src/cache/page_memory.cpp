#include "cache/store_impl.h"

#include <sys/mman.h>

#include <utility>

namespace turboquant {

namespace {

// Reserved only: a page costs memory once it is written to.
void* map_pages(void* at, size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (at != nullptr ? MAP_FIXED : 0);
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    return mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
}

} // namespace

PageMemory::~PageMemory() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

bool PageMemory::allocate(size_t bytes) {
    if (data_ != nullptr) {
        munmap(std::exchange(data_, nullptr), std::exchange(size_, 0));
    }
    if (bytes == 0) {
        return true;
    }
    void* const pages = map_pages(nullptr, bytes);
    if (pages == MAP_FAILED) {
        return false;
    }
    data_ = static_cast<uint8_t*>(pages);
    size_ = bytes;
    return true;
}

void PageMemory::swap(PageMemory& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
}

void PageMemory::zero() {
    // Mapping fresh pages over the old ones gives them back on every POSIX system (what MADV_DONTNEED leaves differs).
    // Where even that fails the contents are cleared the slow way.
    if (data_ != nullptr && map_pages(data_, size_) == MAP_FAILED) {
        __builtin_memset(data_, 0, size_);
    }
}

} // namespace turboquant
