// CRC-32C (Castagnoli), the checksum of a record's sections. Seeds chain:
// crc(crc(0, a), b) = crc(0, ab).
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "edgemoe_core.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define EM_CRC_X86 1
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#define EM_CRC_ARM 1
#include <arm_acle.h>
#endif

namespace {

constexpr uint32_t kPoly = 0x82f63b78;  // bit-reversed 0x1edc6f41

struct Tables {
  uint32_t slice[8][256];  // slice[k][b]: byte b followed by k zero bytes

  Tables() {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ kPoly : crc >> 1;
      slice[0][b] = crc;
    }
    for (uint32_t b = 0; b < 256; ++b) {
      for (int k = 1; k < 8; ++k) {
        slice[k][b] = (slice[k - 1][b] >> 8) ^ slice[0][slice[k - 1][b] & 255];
      }
    }
  }
};

const Tables &tables() {
  static const Tables instance;
  return instance;
}

uint32_t crc_table(uint32_t crc, const uint8_t *data, size_t length) {
  const auto &slice = tables().slice;
  for (; length >= 8; data += 8, length -= 8) {
    const uint32_t low = crc ^ (data[0] | uint32_t{data[1]} << 8 | uint32_t{data[2]} << 16 |
                                uint32_t{data[3]} << 24);
    crc = slice[7][low & 255] ^ slice[6][low >> 8 & 255] ^ slice[5][low >> 16 & 255] ^
          slice[4][low >> 24] ^ slice[3][data[4]] ^ slice[2][data[5]] ^ slice[1][data[6]] ^
          slice[0][data[7]];
  }
  for (; length; --length) crc = (crc >> 8) ^ slice[0][(crc ^ *data++) & 255];
  return crc;
}

#if defined(EM_CRC_X86) || defined(EM_CRC_ARM)

#if defined(EM_CRC_X86)
#define EM_CRC_TARGET __attribute__((target("sse4.2")))
#if defined(__x86_64__)
#define EM_CRC_WORD(crc, word) static_cast<uint32_t>(_mm_crc32_u64((crc), (word)))
#else
#define EM_CRC_WORD(crc, word) \
  _mm_crc32_u32(_mm_crc32_u32((crc), uint32_t(word)), uint32_t((word) >> 32))
#endif
#define EM_CRC_BYTE(crc, byte) _mm_crc32_u8((crc), (byte))
bool has_hardware() { return __builtin_cpu_supports("sse4.2"); }
#else
#define EM_CRC_TARGET
#define EM_CRC_WORD(crc, word) __crc32cd((crc), (word))
#define EM_CRC_BYTE(crc, byte) __crc32cb((crc), (byte))
bool has_hardware() { return true; }
#endif

// The instruction has a latency of three cycles and starts every cycle, so three streams of kLane
// bytes run side by side; `shift` then moves a CRC past the kLane bytes that follow it.
constexpr size_t kLane = 4096;

struct Shift {
  uint32_t table[4][256];

  Shift() {
    static const uint8_t zeros[kLane] = {};
    uint32_t moved[32];  // linear: what becomes of each bit is enough
    for (int bit = 0; bit < 32; ++bit) moved[bit] = crc_table(uint32_t{1} << bit, zeros, kLane);
    for (int byte = 0; byte < 4; ++byte) {
      for (uint32_t value = 0; value < 256; ++value) {
        uint32_t crc = 0;
        for (int bit = 0; bit < 8; ++bit) {
          if (value >> bit & 1) crc ^= moved[8 * byte + bit];
        }
        table[byte][value] = crc;
      }
    }
  }

  uint32_t operator()(uint32_t crc) const {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^
           table[3][crc >> 24];
  }
};

uint64_t load_word(const uint8_t *data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return word;
}

EM_CRC_TARGET uint32_t crc_hardware(uint32_t crc, const uint8_t *data, size_t length) {
  static const Shift shift;
  for (; length >= 3 * kLane; data += 3 * kLane, length -= 3 * kLane) {
    uint32_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      a = EM_CRC_WORD(a, load_word(data + i));
      b = EM_CRC_WORD(b, load_word(data + kLane + i));
      c = EM_CRC_WORD(c, load_word(data + 2 * kLane + i));
    }
    crc = shift(shift(a) ^ b) ^ c;
  }
  for (; length >= 8; data += 8, length -= 8) crc = EM_CRC_WORD(crc, load_word(data));
  for (; length; --length) crc = EM_CRC_BYTE(crc, *data++);
  return crc;
}

#endif

using Function = uint32_t (*)(uint32_t, const uint8_t *, size_t);

Function choose() {
#if defined(EM_CRC_X86) || defined(EM_CRC_ARM)
  if (has_hardware() && std::strcmp(em_isa(), "scalar") != 0) return crc_hardware;
#endif
  return crc_table;
}

}  // namespace

uint32_t em_crc32c(uint32_t seed, const void *data, int64_t num_bytes) {
  static const Function function = choose();
  if (num_bytes <= 0) return seed;
  return ~function(~seed, static_cast<const uint8_t *>(data), static_cast<size_t>(num_bytes));
}
