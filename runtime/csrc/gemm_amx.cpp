// AMX panel kernel: 16 tokens x 16 rows in one tile. A tile of int32 sums has to pass through the
// first cache to be scaled, since the vector unit cannot read tiles; the order of instructions below
// was found by measuring.
#include "gemm.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own _mm512_undefined
#endif
#include <immintrin.h>

#define EM_INLINE static inline __attribute__((always_inline))

namespace em {
namespace {

constexpr int64_t kBlockCols = 512;  // their codes as bytes, 8 KiB, stay in the first cache
constexpr int64_t kBlockUnits = kBlockCols / kActGroup;

// kBlockCols columns of a tile, or what is left of them. byte (row * 4 + j) of line w: the code of
// column 4 w + j, or the number that it stands for.
struct Block {
  alignas(64) uint8_t codes[kBlockCols * kTileRows];
  alignas(64) float scales[kBlockUnits][kTileRows];  // by weight group
  alignas(64) float mins[kBlockUnits][kTileRows];
};

EM_INLINE __m512i line(const uint8_t *p) { return _mm512_loadu_si512(p); }
template <int SHIFT>
EM_INLINE __m512i bits_of_line(__m512i x, __m512i mask) {
  return _mm512_and_si512(_mm512_srli_epi32(x, SHIFT), mask);
}

// 32 columns: the 8 words of 4 columns.
template <int BITS>
EM_INLINE void unpack_unit(const uint8_t *p, __m512i table, uint8_t *dst) {
  const auto put = [&](int word, __m512i codes) {
    const __m512i value = BITS == 8 ? _mm512_xor_si512(codes, table)
                                    : _mm512_shuffle_epi8(table, codes);
    _mm512_store_si512(dst + word * kLineBytes, value);
  };
  if constexpr (BITS == 8) {
    for (int w = 0; w < 8; ++w) put(w, line(p + w * kLineBytes));
  } else if constexpr (BITS == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int w = 0; w < 4; ++w) {
      const __m512i x = line(p + w * kLineBytes);
      put(2 * w, bits_of_line<0>(x, mask));
      put(2 * w + 1, bits_of_line<4>(x, mask));
    }
  } else {
    const __m512i mask = _mm512_set1_epi8(3), high_mask = _mm512_set1_epi8(4);
    __m512i codes[8];
    for (int w = 0; w < 2; ++w) {
      const __m512i x = line(p + w * kLineBytes);
      codes[4 * w] = bits_of_line<0>(x, mask);
      codes[4 * w + 1] = bits_of_line<2>(x, mask);
      codes[4 * w + 2] = bits_of_line<4>(x, mask);
      codes[4 * w + 3] = bits_of_line<6>(x, mask);
    }
    if constexpr (BITS == 3) {
      const __m512i x = line(p + 2 * kLineBytes);
      const auto add = [&](int w, __m512i shifted) {
        codes[w] = _mm512_or_si512(codes[w], _mm512_and_si512(shifted, high_mask));
      };
      add(0, _mm512_slli_epi32(x, 2));
      add(1, _mm512_slli_epi32(x, 1));
      add(2, x);
      add(3, _mm512_srli_epi32(x, 1));
      add(4, _mm512_srli_epi32(x, 2));
      add(5, _mm512_srli_epi32(x, 3));
      add(6, _mm512_srli_epi32(x, 4));
      add(7, _mm512_srli_epi32(x, 5));
    }
    for (int w = 0; w < 8; ++w) put(w, codes[w]);
  }
}

EM_INLINE void load_16_halves(const uint8_t *p, float *dst) {
  _mm512_store_ps(dst, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))));
}

// `table` maps codes below 8 bits, 16 bytes four times; codes of 8 bits are xor-ed with it. Returns
// where the next columns begin.
template <int BITS>
const uint8_t *unpack_block(const uint8_t *p, int64_t num_groups, int64_t units, bool is_asym,
                            __m512i table, Block *block) {
  const int64_t unit_bytes = kLineBytes * BITS;
  uint8_t *codes = block->codes;
  for (int64_t g = 0; g < num_groups;) {
    const uint8_t *scales = p;
    p += is_asym ? 2 * kLineBytes : kLineBytes;
    for (int i = 0; i < 2 && g < num_groups; ++i, ++g, scales += kLineBytes / 2) {
      load_16_halves(scales, block->scales[g]);
      if (is_asym) load_16_halves(scales + kLineBytes, block->mins[g]);
      for (int64_t u = 0; u < units; ++u, p += unit_bytes, codes += 8 * kLineBytes)
        unpack_unit<BITS>(p, table, codes);
    }
  }
  return p;
}

using UnpackBlock = const uint8_t *(*)(const uint8_t *, int64_t, int64_t, bool, __m512i, Block *);

UnpackBlock unpack_of(int bits) {
  if (bits == 2) return unpack_block<2>;
  if (bits == 3) return unpack_block<3>;
  if (bits == 4) return unpack_block<4>;
  return unpack_block<8>;
}

struct Plan {
  UnpackBlock unpack;
  __m512i table;
  int64_t units;  // activation groups per weight group
  bool is_asym;
};

// What the codes stand for: signed numbers, but asymmetric codes as they are. Codes of 8 bits are
// xor-ed with the table, the others are looked up in it.
Plan plan_of(em_format format) {
  const bool is_asym = format.mode == EM_MODE_ASYM;
  const int zero = is_asym ? 0 : 1 << (format.bits - 1);
  alignas(16) uint8_t table[16];
  for (int i = 0; i < 16; ++i) {
    const int value = format.mode == EM_MODE_NF4 ? kNf4Levels[i] : i - zero;
    table[i] = static_cast<uint8_t>(format.bits == 8 ? zero : value);
  }
  return {unpack_of(format.bits),
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(table))),
          format.group_size / kActGroup, is_asym};
}

// One tile: multiply(block, num_groups, panels, num_tokens, acc) for every block of columns and of
// tokens adds to acc [16][16] what the block makes of the tokens. Returns where the next tile begins.
template <class Multiply>
EM_INLINE const uint8_t *for_blocks(const Plan &plan, const uint8_t *tile, int64_t cols,
                                    const ActPanel *panels, int64_t num_tokens, float *out,
                                    int64_t out_stride, Block *block, float *acc,
                                    const Multiply &multiply) {
  const int64_t num_units = cols / kActGroup;
  const int64_t num_blocks = (num_tokens + kPanelTokens - 1) / kPanelTokens;
  for (int64_t i = 0; i < num_blocks * kPanelTokens; ++i) {
    _mm512_store_ps(acc + i * kTileRows, _mm512_setzero_ps());
  }
  for (int64_t s = 0; s < num_units; s += kBlockUnits) {
    const int64_t left = num_units - s;
    const int64_t num_groups = (left < kBlockUnits ? left : kBlockUnits) / plan.units;
    const uint8_t *const next =
        plan.unpack(tile, num_groups, plan.units, plan.is_asym, plan.table, block);
    // The next block comes from memory while this one is multiplied, a few lines at a time.
    const int64_t ahead = (next - tile) / num_blocks;
    for (int64_t b = 0; b < num_blocks; ++b) {
      for (int64_t i = b * ahead; i < (b + 1) * ahead; i += kLineBytes)
        _mm_prefetch(reinterpret_cast<const char *>(next + i), _MM_HINT_T1);
      const int64_t rest = num_tokens - b * kPanelTokens;
      multiply(*block, num_groups, panels + b * num_units + s,
               static_cast<int>(rest < kPanelTokens ? rest : kPanelTokens),
               acc + b * kPanelTokens * kTileRows);
    }
    tile = next;
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    _mm512_storeu_ps(out + t * out_stride, _mm512_load_ps(acc + t * kTileRows));
  }
  return tile;
}

// Tile registers: 0-3 sums, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, kActGroup, kActGroup, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 8, 8};
};

constexpr int64_t kChunk = 4;  // activation groups whose sums are held at a time
constexpr int64_t kSums = kPanelTokens * kTileRows;
constexpr int64_t kUnitCodes = kActGroup * kTileRows;

#define EM_LOAD(ACT, WEIGHT, UNIT)                                 \
  _tile_loadd(ACT, panels[UNIT].q, kActGroup);                     \
  _tile_loadd(WEIGHT, codes + (UNIT)*kUnitCodes, kLineBytes)
#define EM_DOT(SUM, ACT, WEIGHT)                                   \
  _tile_zero(SUM);                                                 \
  if constexpr (ASYM) _tile_dpbsud(SUM, ACT, WEIGHT);              \
  else _tile_dpbssd(SUM, ACT, WEIGHT)
#define EM_STORE(SUM, UNIT) _tile_stored(SUM, dots + (UNIT)*kSums, kTileRows * sizeof(int32_t))

// Token numbers as a list, so that arrays of registers are never indexed at run time.
template <int... T>
struct Tokens {};
using Tokens4 = Tokens<0, 1, 2, 3>;
using Tokens8 = Tokens<0, 1, 2, 3, 4, 5, 6, 7>;
using Tokens16 = Tokens<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

template <int UNITS>
EM_INLINE __m512 part_of(const int32_t *dots, const ActPanel *panels, int token) {
  const auto scaled = [&](int unit) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(dots + unit * kSums + token * kTileRows));
  };
  __m512 part = _mm512_mul_ps(scaled(0), _mm512_set1_ps(panels[0].scale[token]));
  if constexpr (UNITS >= 2)
    part = _mm512_fmadd_ps(scaled(1), _mm512_set1_ps(panels[1].scale[token]), part);
  if constexpr (UNITS >= 4) {
    part = _mm512_fmadd_ps(scaled(2), _mm512_set1_ps(panels[2].scale[token]), part);
    part = _mm512_fmadd_ps(scaled(3), _mm512_set1_ps(panels[3].scale[token]), part);
  }
  return part;
}

// Adds what `num_groups` weight groups, whose dots are there, make of 16 tokens.
template <int UNITS, bool ASYM, int... T>
EM_INLINE void add_groups(const int32_t *dots, const Block &block, int64_t first,
                          int64_t num_groups, const ActPanel *panels, __m512 *sum, Tokens<T...>) {
  for (int64_t g = first; g < first + num_groups; ++g, dots += UNITS * kSums) {
    const ActPanel *const p = panels + g * UNITS;
    const __m512 scale = _mm512_load_ps(block.scales[g]);
    ((sum[T] = _mm512_fmadd_ps(scale, part_of<UNITS>(dots, p, T), sum[T])), ...);
    if constexpr (ASYM) {
      const __m512 min = _mm512_load_ps(block.mins[g]);
      for (int u = 0; u < UNITS; ++u)
        ((sum[T] = _mm512_fmadd_ps(min, _mm512_set1_ps(p[u].sum[T]), sum[T])), ...);
    }
  }
}

// Four tiles of sums take turns. A tile is stored two products after its own, since a store that
// waits for its product holds up the products behind it; two products run on while the vector unit
// scales the sums of the last kChunk units.
template <int UNITS, bool ASYM, int... T>
void multiply(const Block &block, int64_t num_groups, const ActPanel *panels, float *acc,
              Tokens<T...> tokens) {
  alignas(64) int32_t dots[kChunk * kSums];
  const uint8_t *const codes = block.codes;
  const int64_t num_units = num_groups * UNITS, whole = num_units / kChunk * kChunk;
  __m512 sum[] = {_mm512_load_ps(acc + T * kTileRows)...};
  if (whole > 0) {
    EM_LOAD(4, 6, 0);
    EM_DOT(0, 4, 6);
    EM_LOAD(5, 7, 1);
    EM_DOT(1, 5, 7);
  }
  for (int64_t u = 0; u < whole; u += kChunk) {
    EM_LOAD(4, 6, u + 2);
    EM_DOT(2, 4, 6);
    EM_STORE(0, 0);
    EM_LOAD(5, 7, u + 3);
    EM_DOT(3, 5, 7);
    EM_STORE(1, 1);
    if (u + kChunk < whole) {
      EM_LOAD(4, 6, u + 4);
      EM_DOT(0, 4, 6);
      EM_STORE(2, 2);
      EM_LOAD(5, 7, u + 5);
      EM_DOT(1, 5, 7);
      EM_STORE(3, 3);
    } else {
      EM_STORE(2, 2);
      EM_STORE(3, 3);
    }
    add_groups<UNITS, ASYM>(dots, block, u / UNITS, kChunk / UNITS, panels, sum, tokens);
  }
  for (int64_t u = whole; u < num_units; ++u) {
    EM_LOAD(4, 6, u);
    EM_DOT(0, 4, 6);
    EM_STORE(0, u - whole);
  }
  add_groups<UNITS, ASYM>(dots, block, whole / UNITS, num_groups - whole / UNITS, panels, sum,
                          tokens);
  (_mm512_store_ps(acc + T * kTileRows, sum[T]), ...);
}

template <int UNITS, bool ASYM>
void multiply_any(const Block &block, int64_t num_groups, const ActPanel *panels, int num_tokens,
                  float *acc) {
  if (num_tokens > 8) return multiply<UNITS, ASYM>(block, num_groups, panels, acc, Tokens16());
  if (num_tokens > 4) return multiply<UNITS, ASYM>(block, num_groups, panels, acc, Tokens8());
  multiply<UNITS, ASYM>(block, num_groups, panels, acc, Tokens4());
}

using BlockKernel = void (*)(const Block &, int64_t, const ActPanel *, int, float *);

template <bool ASYM>
BlockKernel kernel_of(int64_t units) {
  if (units == 1) return multiply_any<1, ASYM>;
  return units == 2 ? multiply_any<2, ASYM> : multiply_any<4, ASYM>;
}

void panels_amx(const uint8_t *tiles, int64_t num_tiles, int64_t cols, em_format format,
                const ActPanel *panels, int64_t num_tokens, float *out, int64_t out_stride) {
  TileConfig config;
  if (num_tokens < kPanelTokens) {
    for (int i = 0; i < 6; ++i) config.rows[i] = static_cast<uint8_t>(num_tokens);
  }
  const Plan plan = plan_of(format);
  const BlockKernel kernel = plan.is_asym ? kernel_of<true>(plan.units) : kernel_of<false>(plan.units);
  Block block;
  alignas(64) float acc[kMaxPanelTokens * kTileRows];
  _tile_loadconfig(&config);  // takes as long as a few products
  for (int64_t i = 0; i < num_tiles; ++i, out += kTileRows) {
    tiles = for_blocks(plan, tiles, cols, panels, num_tokens, out, out_stride, &block, acc, kernel);
  }
  _tile_release();
}

}  // namespace

const Kernels *kernels_amx() {
  static const Kernels table = [] {
    Kernels made = *kernels_avx512vnni();  // for single tokens
    made.name = "amx";
    made.panels = panels_amx;
    return made;
  }();
  return &table;
}

}  // namespace em
#else
namespace em {
const Kernels *kernels_amx() { return nullptr; }
}  // namespace em
#endif
