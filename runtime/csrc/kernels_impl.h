// The template source of every instruction set. Included inside that set's own namespace, after its
// lanes: types F (16 floats), B (64 code bytes) and Dot, and the functions on them. Nothing of the
// standard library may be used here: the linker might keep the copy of an inline function that was
// compiled for a newer instruction set than the machine has.
//
// One order of float operations for all levels, token counts and positions. For a token and a row:
//   part = sum over the activation groups s of the weight group, ascending, of scale_s * dot_s
//   acc  = fma(weight scale, part, acc), weight groups ascending
//   asymmetric, after that: acc = fma(weight min, scale_s * sum_s, acc) for each s, ascending
// dot_s is an exact integer that fits a float.

// The weights in use are fetched into the first cache from the second, and further ahead from memory
// into the second: the processor's own prefetch stops at every page, and the first cache alone has
// too few lines under way. Two threads at 4 bits reach .96 of a plain sweep with both, .86 with one
// step of 2 KiB; 1 and .75 KiB, 3, 5 and 8 KiB were worse.
constexpr int64_t kAhead = 1536;
EM_INLINE void fetch_ahead(const uint8_t *p) {
  __builtin_prefetch(p + kAhead);
  __builtin_prefetch(p + kFarAhead, 0, 2);
}

// How the codes of a format read. The dot product of a word (4 columns of 16 rows) is taken of
// unsigned numbers, code or table entry, and kZero * sum(q) is taken off.
template <int BITS, int MODE>
struct Coding {
  static constexpr int kBits = BITS;
  static constexpr int kMask = (1 << BITS) - 1, kPlace = BITS == 2 ? 2 : 4;
  static constexpr bool kIsAsym = MODE == EM_MODE_ASYM;
  static constexpr bool kIsTable = MODE == EM_MODE_NF4;
  static constexpr bool kIsByte = BITS == 8 || kIsTable;  // operands above 15
  static constexpr int kZeroShift = kIsTable ? 7 : BITS - 1;
  static constexpr int kZero = kIsAsym ? 0 : 1 << kZeroShift;
};

template <class C, int NT>
EM_INLINE void add_word(Dot *dot, B word, const ActGroup *const *a, int64_t s, int number) {
  EM_UNROLL
  for (int t = 0; t < NT; ++t) dot[t] = dot_add<C>(dot[t], word, a[t][s].q + 4 * number);
}

// Below 8 bits a register has the codes of two words, of the second one C::kPlace bits up. With one
// token it is cheaper to leave those there and to shift their sum down: before the others are added
// where the registers hold the codes until then, else beside them.
template <class C, int NT>
constexpr bool kShiftsSum = NT == 1 && kSplits<C>;
template <class C, int NT>
constexpr bool kAddsInTurn = kShiftsSum<C, NT> && kHoldsUnit;

template <class C>
EM_INLINE B operand_of(B code) {
  if constexpr (C::kIsTable) return level_of(code);
  return code;
}
template <class C, int NT>
EM_INLINE B first_word(B x) {
  return operand_of<C>(masked<C::kMask>(x));
}
template <class C, int NT>
EM_INLINE B second_word(B x) {
  if constexpr (kShiftsSum<C, NT>) return masked<(C::kMask << C::kPlace)>(x);
  return operand_of<C>(masked<C::kMask>(shifted_right<C::kPlace>(x)));
}

// Of 3 bits: `low_bits` has the low codes of two words at bits 0 and 4, `high_bits` their high bit at
// bits 2 and 6; what lies between is of other words.
EM_INLINE B words_of_3(B low_bits, B high_bits) { return selected<0x33>(low_bits, high_bits); }

// The 8 words of 32 columns.
template <class C>
EM_INLINE void load_pairs(const uint8_t *p, B *pairs) {
  if constexpr (C::kBits == 2) {
    pairs[0] = load_bytes(p);
    pairs[1] = shifted_right<4>(pairs[0]);
    pairs[2] = load_bytes(p + kLineBytes);
    pairs[3] = shifted_right<4>(pairs[2]);
  } else if constexpr (C::kBits == 3) {
    const B x = load_bytes(p), y = load_bytes(p + kLineBytes), h = load_bytes(p + 2 * kLineBytes);
    const B even = selected<15>(x, shifted_left<4>(y));  // words 0, 1, 4, 5
    const B odd = selected<15>(shifted_right<4>(x), y);  // words 2, 3, 6, 7
    pairs[0] = words_of_3(even, shifted_left<2>(h));
    pairs[1] = words_of_3(shifted_right<2>(even), shifted_left<1>(h));
    pairs[2] = words_of_3(odd, h);
    pairs[3] = words_of_3(shifted_right<2>(odd), shifted_right<1>(h));
  } else {
    EM_UNROLL
    for (int i = 0; i < 4; ++i) pairs[i] = load_bytes(p + i * kLineBytes);
  }
}

// Spread over the 8 words, of which `done` are done.
template <class C>
EM_INLINE void fetch_lines_ahead(const uint8_t *p, int done) {
  EM_UNROLL
  for (int line = 0; line < C::kBits; ++line) {
    if (line * 8 / C::kBits == done) fetch_ahead(p + line * kLineBytes);
  }
}

template <class C>
constexpr int first_number(int pair) {
  return C::kBits == 3 ? pair : 2 * pair;
}
template <class C>
constexpr int second_number(int pair) {
  return C::kBits == 3 ? pair + 4 : 2 * pair + 1;
}

template <class C, int NT>
EM_INLINE void add_pairs_in_turn(const uint8_t *p, const B *pairs, const ActGroup *const *a,
                                 int64_t s, Dot *dot) {
  EM_UNROLL
  for (int i = 0; i < 4; ++i) {
    fetch_lines_ahead<C>(p, i);
    add_word<C, NT>(dot, second_word<C, NT>(pairs[i]), a, s, second_number<C>(i));
  }
  dot[0] = shifted_down<C::kPlace>(dot[0]);
  EM_UNROLL
  for (int i = 0; i < 4; ++i) {
    fetch_lines_ahead<C>(p, 4 + i);
    add_word<C, NT>(dot, first_word<C, NT>(pairs[i]), a, s, first_number<C>(i));
  }
}

template <class C, int NT>
EM_INLINE void add_pairs(const uint8_t *p, const B *pairs, const ActGroup *const *a, int64_t s,
                         Dot *dot) {
  Dot above[1] = {dot_zero()};
  EM_UNROLL
  for (int i = 0; i < 4; ++i) {
    fetch_lines_ahead<C>(p, 2 * i);
    add_word<C, NT>(dot, first_word<C, NT>(pairs[i]), a, s, first_number<C>(i));
    fetch_lines_ahead<C>(p, 2 * i + 1);
    add_word<C, NT>(kShiftsSum<C, NT> ? above : dot, second_word<C, NT>(pairs[i]), a, s,
                    second_number<C>(i));
  }
  if constexpr (kShiftsSum<C, NT>) dot[0] = sum_of(dot[0], shifted_down<C::kPlace>(above[0]));
}

template <class C, int NT>
EM_INLINE void add_bytes(const uint8_t *p, const ActGroup *const *a, int64_t s, Dot *dot) {
  EM_UNROLL
  for (int i = 0; i < 8; ++i) {
    fetch_lines_ahead<C>(p, i);
    add_word<C, NT>(dot, byte_code(load_bytes(p + i * kLineBytes)), a, s, i);
  }
}

// part += scale_s * dot_s for the 32 columns whose codes start at p.
template <class C, int NT>
EM_INLINE void add_unit(const uint8_t *p, const ActGroup *const *a, int64_t s, F *part) {
  Dot dot[NT];
  EM_UNROLL
  for (int t = 0; t < NT; ++t) {
    dot[t] = dot_begin<C, kAddsInTurn<C, NT> ? C::kPlace : 0>(a[t][s].negative_sum);
  }
  if constexpr (C::kBits == 8) {
    add_bytes<C, NT>(p, a, s, dot);
  } else {
    B pairs[4];
    load_pairs<C>(p, pairs);
    if constexpr (kAddsInTurn<C, NT>) {
      add_pairs_in_turn<C, NT>(p, pairs, a, s, dot);
    } else {
      add_pairs<C, NT>(p, pairs, a, s, dot);
    }
  }
  EM_UNROLL
  for (int t = 0; t < NT; ++t) {
    const F sum = dot_end<C>(dot[t], a[t][s].negative_sum);
    part[t] = fma(sum, broadcast(a[t][s].scale), part[t]);
  }
}

// `units` activation groups share a weight scale. Not a template parameter: a loop over them costs
// nothing measurable, unrolled they were most of what there was to compile. A compiler that clones
// the function for every value unrolls it after all and has all lines fetched at once: with two
// threads 2 and 3 bits reach .83 to .85 of a plain sweep then, .87 as it is.
template <class C, int NT>
EM_NOINLINE void tile_codes(const uint8_t *p, int64_t cols, int64_t units, const void *const *x,
                            float *out, int64_t out_stride) {
  F acc[NT];
  const ActGroup *a[NT];
  EM_UNROLL
  for (int t = 0; t < NT; ++t) {
    acc[t] = broadcast(0.0f);
    a[t] = static_cast<const ActGroup *>(x[t]);
  }
  const int64_t num_units = cols / kActGroup;
  for (int64_t s = 0; s < num_units;) {
    const uint8_t *scales = p;
    fetch_ahead(p);
    p += C::kIsAsym ? 2 * kLineBytes : kLineBytes;
    for (int i = 0; i < 2 && s < num_units; ++i, scales += kLineBytes / 2) {
      F part[NT];
      EM_UNROLL
      for (int t = 0; t < NT; ++t) part[t] = broadcast(0.0f);
      const int64_t first = s;
      for (; s < first + units; ++s, p += C::kBits * kLineBytes) add_unit<C, NT>(p, a, s, part);
      const F weight_scale = load_half(scales);
      EM_UNROLL
      for (int t = 0; t < NT; ++t) acc[t] = fma(weight_scale, part[t], acc[t]);
      if constexpr (C::kIsAsym) {
        const F weight_min = load_half(scales + kLineBytes);
        for (int64_t u = first; u < s; ++u) {
          EM_UNROLL
          for (int t = 0; t < NT; ++t) acc[t] = fma(weight_min, broadcast(a[t][u].sum), acc[t]);
        }
      }
    }
  }
  EM_UNROLL
  for (int t = 0; t < NT; ++t) store(out + t * out_stride, acc[t]);
}

// 16-bit tiles: column c goes to accumulator c mod 4, combined as (0 + 1) + (2 + 3).
template <bool FP16, int NT>
void tile_16bit(const uint8_t *p, int64_t cols, const void *const *x, float *out,
                int64_t out_stride) {
  F acc[4][NT];
  const float *a[NT];
  EM_UNROLL
  for (int t = 0; t < NT; ++t) {
    acc[0][t] = acc[1][t] = acc[2][t] = acc[3][t] = broadcast(0.0f);
    a[t] = static_cast<const float *>(x[t]);
  }
  int64_t c = 0;
  for (; c + 4 <= cols; c += 4, p += 2 * kLineBytes) {
    fetch_ahead(p);
    fetch_ahead(p + kLineBytes);
    const B line0 = load_bytes(p), line1 = load_bytes(p + kLineBytes);
    const F w0 = low_half<FP16>(line0), w1 = high_half<FP16>(line0);
    EM_UNROLL
    for (int t = 0; t < NT; ++t) {
      acc[0][t] = fma(w0, broadcast(a[t][c]), acc[0][t]);
      acc[1][t] = fma(w1, broadcast(a[t][c + 1]), acc[1][t]);
    }
    const F w2 = low_half<FP16>(line1), w3 = high_half<FP16>(line1);
    EM_UNROLL
    for (int t = 0; t < NT; ++t) {
      acc[2][t] = fma(w2, broadcast(a[t][c + 2]), acc[2][t]);
      acc[3][t] = fma(w3, broadcast(a[t][c + 3]), acc[3][t]);
    }
  }
  if (c < cols) {
    const B line = load_bytes(p);
    const F w0 = low_half<FP16>(line), w1 = high_half<FP16>(line);
    EM_UNROLL
    for (int t = 0; t < NT; ++t) {
      acc[0][t] = fma(w0, broadcast(a[t][c]), acc[0][t]);
      acc[1][t] = fma(w1, broadcast(a[t][c + 1]), acc[1][t]);
    }
  }
  EM_UNROLL
  for (int t = 0; t < NT; ++t)
    store(out + t * out_stride, add(add(acc[0][t], acc[1][t]), add(acc[2][t], acc[3][t])));
}

template <class C, int UNITS>
struct CodesTile {
  static constexpr int kMaxBlock = kMaxCodesBlock;
  template <int NT>
  static void run(const uint8_t *tile, int64_t cols, const void *const *x, float *out,
                  int64_t out_stride) {
    tile_codes<C, NT>(tile, cols, UNITS, x, out, out_stride);
  }
};

template <bool FP16>
struct WordsTile {
  static constexpr int kMaxBlock = kMax16bitBlock;
  template <int NT>
  static void run(const uint8_t *tile, int64_t cols, const void *const *x, float *out,
                  int64_t out_stride) {
    tile_16bit<FP16, NT>(tile, cols, x, out, out_stride);
  }
};

// Blocks of 8, 4, 2, 1 tokens, none larger than the registers of the level hold.
template <class Tile>
void in_blocks(const uint8_t *tile, int64_t cols, const void *const *x, int num_tokens, float *out,
               int64_t out_stride) {
  for (int t = 0; t < num_tokens;) {
    const int left = num_tokens - t;
    float *dst = out + t * out_stride;
    if constexpr (Tile::kMaxBlock >= 8) {
      if (left >= 8) {
        Tile::template run<8>(tile, cols, x + t, dst, out_stride);
        t += 8;
        continue;
      }
    }
    if constexpr (Tile::kMaxBlock >= 4) {
      if (left >= 4) {
        Tile::template run<4>(tile, cols, x + t, dst, out_stride);
        t += 4;
        continue;
      }
    }
    if (left >= 2) {
      Tile::template run<2>(tile, cols, x + t, dst, out_stride);
      t += 2;
    } else {
      Tile::template run<1>(tile, cols, x + t, dst, out_stride);
      t += 1;
    }
  }
}

template <class C>
TileKernel with_group(int group_size) {
  if (group_size == 32) return in_blocks<CodesTile<C, 1>>;
  if (group_size == 64) return in_blocks<CodesTile<C, 2>>;
  return in_blocks<CodesTile<C, 4>>;
}

template <int MODE>
TileKernel with_bits(int bits, int group_size) {
  if (bits == 2) return with_group<Coding<2, MODE>>(group_size);
  if (bits == 3) return with_group<Coding<3, MODE>>(group_size);
  if (bits == 4) return with_group<Coding<4, MODE>>(group_size);
  return with_group<Coding<8, MODE>>(group_size);
}

TileKernel tile(em_format format) {
  if (format.mode == EM_MODE_BF16) return in_blocks<WordsTile<false>>;
  if (format.mode == EM_MODE_FP16) return in_blocks<WordsTile<true>>;
  if (format.mode == EM_MODE_NF4) return with_group<Coding<4, EM_MODE_NF4>>(format.group_size);
  return format.mode == EM_MODE_ASYM ? with_bits<EM_MODE_ASYM>(format.bits, format.group_size)
                                     : with_bits<EM_MODE_SYM>(format.bits, format.group_size);
}

EM_INLINE float float_of(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
EM_INLINE int32_t bits_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Adding it rounds a float below 2^22 to an integer, nearest even, left in the low mantissa bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4b400000;

void quantize(const float *x, int64_t cols, ActGroup *dst) {
  for (int64_t g = 0; g < cols / kActGroup; ++g, x += kActGroup, ++dst) {
    int32_t largest_bits = 0;  // compared as integers, so that NaN counts as the largest
    for (int i = 0; i < kActGroup; ++i) {
      const int32_t bits = bits_of(x[i]) & 0x7fffffff;
      largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    const float largest = float_of(largest_bits);
    const bool is_finite = largest_bits < 0x7f800000;
    if (!is_finite || largest < 0x1p-116f) {
      for (int i = 0; i < kActGroup; ++i) dst->q[i] = 0;
      dst->scale = dst->sum = is_finite ? 0.0f : float_of(0x7fc00000);
      dst->negative_sum = 0;
      continue;
    }
    const float inverse = 127.0f / largest;
    int32_t sum = 0;
    for (int i = 0; i < kActGroup; ++i) {
      const int32_t q = bits_of(x[i] * inverse + kRound) - kRoundBits;
      dst->q[i] = static_cast<int8_t>(q);
      sum += q;
    }
    dst->scale = largest / 127.0f;
    dst->sum = dst->scale * static_cast<float>(sum);
    dst->negative_sum = -sum;
  }
}

// exp(x) for -87 <= x <= 88 within 2 units in the last place; NaN stays NaN.
EM_INLINE float exp_of(float x) {
  x = -87.0f > x ? -87.0f : x;
  x = 88.0f < x ? 88.0f : x;
  const float shifted = EM_FMA(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
  float r = EM_FMA(n, -0.693359375f, x);
  r = EM_FMA(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = EM_FMA(p, r, 1.3981999507e-3f);
  p = EM_FMA(p, r, 8.3334519073e-3f);
  p = EM_FMA(p, r, 4.1665795894e-2f);
  p = EM_FMA(p, r, 1.6666665459e-1f);
  p = EM_FMA(p, r, 5.0000001201e-1f);
  p = EM_FMA(p, r * r, r) + 1.0f;
  const int32_t power = bits_of(shifted) - kRoundBits + 127;
  return p * float_of(static_cast<int32_t>(static_cast<uint32_t>(power) << 23));
}

void silu_mul(const float *gate, const float *up, int64_t num, float *h) {
  for (int64_t i = 0; i < num; ++i) h[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

void add_scaled(float weight, const float *x, int64_t num, float *y) {
  for (int64_t i = 0; i < num; ++i) y[i] = EM_FMA(weight, x[i], y[i]);
}

uint64_t sweep(const uint8_t *data, int64_t num_lines) {
  B sum[4] = {};
  for (int64_t line = 0; line + 4 <= num_lines; line += 4, data += 4 * kLineBytes) {
    EM_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] = either(sum[i], load_bytes(data + i * kLineBytes));
  }
  for (int64_t i = 0; i < num_lines % 4; ++i)
    sum[i] = either(sum[i], load_bytes(data + i * kLineBytes));
  const B all = either(either(sum[0], sum[1]), either(sum[2], sum[3]));
  uint64_t words[8];
  __builtin_memcpy(words, &all, sizeof words);
  for (int i = 1; i < 8; ++i) words[0] |= words[i];
  return words[0];
}

constexpr Kernels kTable = {kName, tile, quantize, silu_mul, add_scaled, sweep};
