// A thread's working memory, kept between calls: fresh pages cost several times what a kernel does with them.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace pydistill {

inline void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;  // should the next line throw
    memory.reset(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64)));
    size = bytes;
  }
  return memory.get();
}

}  // namespace pydistill
