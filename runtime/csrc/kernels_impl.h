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

// How far ahead of the weights in use the next ones are fetched. The processor's own prefetch stops
// at every page; of 1, 1.5, 2 and 4 KiB this was best, the loop a sixth faster than without.
constexpr int64_t kAhead = 2048;

// Word W (4 columns) of the 32 columns whose codes start at p.
template <int BITS, int W>
EM_INLINE B code_word(const uint8_t *p) {
  if constexpr (BITS == 8) return load_bytes(p + W * kLineBytes);
  if constexpr (BITS == 4) {
    return W % 2 == 0 ? masked<0x0f>(load_bytes(p + W / 2 * kLineBytes))
                      : masked<0x0f>(shifted_right<4>(load_bytes(p + W / 2 * kLineBytes)));
  }
  if constexpr (BITS == 2) {
    return masked<0x03>(shifted_right<2 * (W % 4)>(load_bytes(p + W / 4 * kLineBytes)));
  }
  if constexpr (BITS == 3) {
    const B high = load_bytes(p + 2 * kLineBytes);
    const B low = masked<0x03>(shifted_right<2 * (W % 4)>(load_bytes(p + W / 4 * kLineBytes)));
    if constexpr (W < 2) return either(low, masked<0x04>(shifted_left<2 - W>(high)));
    if constexpr (W >= 2) return either(low, masked<0x04>(shifted_right<W - 2>(high)));
  }
}

template <int BITS, int NT, int W>
EM_INLINE void dot_word(const uint8_t *p, const ActGroup *const *a, int64_t s, Dot *dot) {
  const B code = code_word<BITS, W>(p);
  EM_UNROLL
  for (int t = 0; t < NT; ++t) dot[t] = dot_add<BITS>(dot[t], code, a[t][s].q + 4 * W);
}

template <int BITS, int G, bool ASYM, int NT>
EM_INLINE const uint8_t *weight_group(const uint8_t *p, const uint8_t *scales, const uint8_t *mins,
                                      const ActGroup *const *a, int64_t s, F *acc) {
  F part[NT];
  EM_UNROLL
  for (int i = 0; i < G / kActGroup; ++i) {
    Dot dot[NT];
    EM_UNROLL
    for (int t = 0; t < NT; ++t) dot[t] = dot_begin<BITS, ASYM>(a[t][s + i].negative_sum);
    EM_UNROLL
    for (int line = 0; line < BITS; ++line) __builtin_prefetch(p + kAhead + line * kLineBytes);
    dot_word<BITS, NT, 0>(p, a, s + i, dot);
    dot_word<BITS, NT, 1>(p, a, s + i, dot);
    dot_word<BITS, NT, 2>(p, a, s + i, dot);
    dot_word<BITS, NT, 3>(p, a, s + i, dot);
    dot_word<BITS, NT, 4>(p, a, s + i, dot);
    dot_word<BITS, NT, 5>(p, a, s + i, dot);
    dot_word<BITS, NT, 6>(p, a, s + i, dot);
    dot_word<BITS, NT, 7>(p, a, s + i, dot);
    EM_UNROLL
    for (int t = 0; t < NT; ++t) {
      const F sum = dot_end<BITS, ASYM>(dot[t], a[t][s + i].negative_sum);
      const F scale = broadcast(a[t][s + i].scale);
      part[t] = i == 0 ? mul(sum, scale) : fma(sum, scale, part[t]);
    }
    p += kLineBytes * BITS;
  }
  const F weight_scale = load_half(scales);
  EM_UNROLL
  for (int t = 0; t < NT; ++t) acc[t] = fma(weight_scale, part[t], acc[t]);
  if constexpr (ASYM) {
    const F weight_min = load_half(mins);
    EM_UNROLL
    for (int i = 0; i < G / kActGroup; ++i) {
      EM_UNROLL
      for (int t = 0; t < NT; ++t) acc[t] = fma(weight_min, broadcast(a[t][s + i].sum), acc[t]);
    }
  }
  return p;
}

template <int BITS, int G, bool ASYM, int NT>
void tile_codes(const uint8_t *p, int64_t cols, const void *const *x, float *out,
                int64_t out_stride) {
  F acc[NT];
  const ActGroup *a[NT];
  EM_UNROLL
  for (int t = 0; t < NT; ++t) {
    acc[t] = broadcast(0.0f);
    a[t] = static_cast<const ActGroup *>(x[t]);
  }
  constexpr int kLines = ASYM ? 2 : 1;
  const int64_t num_groups = cols / G;
  int64_t s = 0;
  for (int64_t g = 0; g + 2 <= num_groups; g += 2, s += 2 * G / kActGroup) {
    const uint8_t *line = p;
    __builtin_prefetch(line + kAhead);
    p = weight_group<BITS, G, ASYM, NT>(p + kLines * kLineBytes, line, line + kLineBytes, a, s, acc);
    p = weight_group<BITS, G, ASYM, NT>(p, line + 32, line + kLineBytes + 32, a, s + G / kActGroup,
                                        acc);
  }
  if (num_groups % 2)
    weight_group<BITS, G, ASYM, NT>(p + kLines * kLineBytes, p, p + kLineBytes, a, s, acc);
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
    __builtin_prefetch(p + kAhead);
    __builtin_prefetch(p + kAhead + kLineBytes);
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

template <int BITS, int G, bool ASYM>
struct CodesTile {
  static constexpr int kMaxBlock = kMaxCodesBlock;
  template <int NT>
  static void run(const uint8_t *tile, int64_t cols, const void *const *x, float *out,
                  int64_t out_stride) {
    tile_codes<BITS, G, ASYM, NT>(tile, cols, x, out, out_stride);
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

template <int BITS, bool ASYM>
TileKernel with_group(int group_size) {
  if (group_size == 32) return in_blocks<CodesTile<BITS, 32, ASYM>>;
  if (group_size == 64) return in_blocks<CodesTile<BITS, 64, ASYM>>;
  return in_blocks<CodesTile<BITS, 128, ASYM>>;
}

template <bool ASYM>
TileKernel with_bits(int bits, int group_size) {
  if (bits == 2) return with_group<2, ASYM>(group_size);
  if (bits == 3) return with_group<3, ASYM>(group_size);
  if (bits == 4) return with_group<4, ASYM>(group_size);
  return with_group<8, ASYM>(group_size);
}

TileKernel tile(em_format format) {
  if (format.mode == EM_MODE_BF16) return in_blocks<WordsTile<false>>;
  if (format.mode == EM_MODE_FP16) return in_blocks<WordsTile<true>>;
  return format.mode == EM_MODE_ASYM ? with_bits<true>(format.bits, format.group_size)
                                     : with_bits<false>(format.bits, format.group_size);
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

constexpr Kernels kTable = {kName, tile, quantize, silu_mul, add_scaled};
