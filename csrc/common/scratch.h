// A thread's working memory, kept between calls: fresh pages cost several times as much as a kernel's work on them.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>
#include <new>

namespace pydistill {

// Asks for large pages if [memory, memory + bytes) spans any: kernels that stride through megabytes otherwise spend
// their time on address translation. Advice only; useless once the pages are in use.
inline void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page * page,
                  last = (start + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;  // in case the next line throws
    memory.reset(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64)));
    advise_large_pages(memory.get(), bytes);
    size = bytes;
  }
  return memory.get();
}

}  // namespace pydistill
