// CRC-32 as in zlib, gzip and zip (polynomial 0xEDB88320, bits reflected); torch-free.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydistill {

// The checksum of `size` bytes that follow others whose checksum is `value` (0: none).
uint32_t crc32(const uint8_t* data, std::size_t size, uint32_t value = 0);

}  // namespace pydistill
