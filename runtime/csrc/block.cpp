// The blocks of a decoder layer: attention half, dense mlp and shared expert.
#include <cerrno>
#include <cstring>

#include "decoder.h"
#include "kernels.h"
#include "prefetch.h"
#include "thread_pool.h"

namespace em {
// y [T, rows] dense.
int32_t Decoder::multiply(const em_matrix &matrix, const float *x, int64_t num_tokens,
                          const float *bias, float *y) {
  const auto part = [&](int i, const float *part_bias, float *dst) {
    return em_linear(pool_, matrix.packed[i], matrix.rows, matrix.cols, matrix.format, x, num_tokens,
                     part_bias, dst);
  };
  if (matrix.num_parts == 1) return part(0, bias, y);
  const int64_t num = num_tokens * matrix.rows;
  float *middle = parts_.floats(2 * num);
  if (middle == nullptr) return -ENOMEM;
  float *low = middle + num;
  int32_t status = part(0, nullptr, y);
  if (status == 0) status = part(1, nullptr, middle);
  if (status == 0) status = part(2, nullptr, low);
  if (status != 0) return status;
  for (int64_t i = 0; i < num; ++i) {
    y[i] += middle[i] + low[i];
    if (bias != nullptr) y[i] += bias[i % matrix.rows];
  }
  return 0;
}

// Several matrices of one input, stacked in one or each its own; y has room for all their rows.
int32_t Decoder::multiply_all(const em_matrix *matrices, int num, const int64_t *rows,
                              const float *x, int64_t num_tokens, const float *bias, float *y,
                              Rows *results) {
  const bool is_stacked = matrices[1].rows == 0;
  int64_t first = 0;
  for (int i = 0; i < num; ++i) {
    results[i].data = is_stacked ? y + first : y + num_tokens * first;
    results[i].stride = is_stacked ? matrices[0].rows : rows[i];
    if (!is_stacked) {
      const float *part_bias = bias ? bias + first : nullptr;
      const int32_t status = multiply(matrices[i], x, num_tokens, part_bias, results[i].data);
      if (status != 0) return status;
    }
    first += rows[i];
  }
  return is_stacked ? multiply(matrices[0], x, num_tokens, bias, y) : 0;
}

// Norm, clip and rotation of one token's queries, keys and values.
void Decoder::finish_heads(const em_block &layer, const Rows *qkv, const float *cos,
                           const float *sin, int64_t token) const {
  const RowKernels &level = row_kernels();
  const int64_t head_dim = model_.head_dim, half = model_.rotary_dim / 2;
  const int64_t num_heads[3] = {model_.num_heads, model_.num_kv_heads, model_.num_kv_heads};
  const float *norms[2] = {layer.q_norm, layer.k_norm};
  for (int part = 0; part < 3; ++part) {
    float *heads = qkv[part].row(token);
    const int64_t width = num_heads[part] * head_dim;
    if (part < 2 && model_.qk_norm == EM_QK_NORM_WHOLE) {
      level.rms_norm(heads, norms[part], width, model_.rms_eps, heads);
    }
    if (model_.clip > 0) level.clamp(heads, width, model_.clip);
    if (part == 2) break;
    for (float *head = heads; head < heads + width; head += head_dim) {
      if (model_.qk_norm == EM_QK_NORM_HEAD) {
        level.rms_norm(head, norms[part], head_dim, model_.rms_eps, head);
      }
      level.rotate(head, cos + token * half, sin + token * half, half);
    }
  }
}

// part 0: keys, 1: values.
void Decoder::store_heads(const em_kv_cache &kv, int64_t layer, int part, const float *heads,
                          int64_t token) const {
  const RowKernels &level = row_kernels();
  const int64_t head_dim = model_.head_dim;
  for (int64_t head = 0; head < model_.num_kv_heads; ++head, heads += head_dim) {
    const int64_t place =
        ((layer * 2 + part) * model_.num_kv_heads + head) * kv.capacity + kv.position + token;
    if (kv.kv_bits == 32) {
      std::memcpy(static_cast<float *>(kv.data) + place * head_dim, heads, head_dim * sizeof(float));
    } else if (kv.kv_bits == 16) {
      level.to_bf16(heads, head_dim, static_cast<uint16_t *>(kv.data) + place * head_dim);
    } else {
      int8_t *dst = static_cast<int8_t *>(kv.data) + place * head_dim;
      kv.scales[place] = level.to_int8(heads, head_dim, dst);
    }
  }
}

int32_t Decoder::attend(int64_t number, const em_kv_cache &kv, const float *cos, const float *sin,
                        int64_t num_tokens, const int32_t *token_ids, float *x, float *normed,
                        int32_t *ids, float *weights) {
  const RowKernels &level = row_kernels();
  const em_block &layer = layers_[number];
  const int64_t hidden = model_.hidden, head_dim = model_.head_dim;
  const int64_t kv_width = model_.num_kv_heads * head_dim;
  const int64_t rows[3] = {model_.num_heads * head_dim, kv_width, kv_width};
  float *qkv_buffer = qkv_.floats(num_tokens * (rows[0] + 2 * kv_width));
  float *mixed = mixed_.floats(num_tokens * rows[0]);
  float *projected = projected_.floats(num_tokens * hidden);
  if (!qkv_buffer || !mixed || !projected) return -ENOMEM;

  parallel_for(pool_, num_tokens, [&](int64_t t, int) {
    level.rms_norm(x + t * hidden, layer.input_norm, hidden, model_.rms_eps, normed + t * hidden);
  });
  Rows qkv[3];
  int32_t status =
      multiply_all(layer.qkv, 3, rows, normed, num_tokens, layer.qkv_bias, qkv_buffer, qkv);
  if (status != 0) return status;
  if (between_ != nullptr) between_->step();
  parallel_for(pool_, num_tokens, [&](int64_t t, int) {
    finish_heads(layer, qkv, cos, sin, t);
    store_heads(kv, number, 0, qkv[1].row(t), t);
    store_heads(kv, number, 1, qkv[2].row(t), t);
  });

  const int64_t heads = model_.num_kv_heads * kv.capacity;  // of one part of one layer
  const int64_t part_bytes = heads * head_dim * (kv.kv_bits / 8);
  const char *keys = static_cast<const char *>(kv.data) + number * 2 * part_bytes;
  const float *scales = kv.scales ? kv.scales + number * 2 * heads : nullptr;
  AttentionCall call;
  call.q = qkv[0].data;
  call.q_stride = qkv[0].stride;
  call.keys = keys;
  call.values = keys + part_bytes;
  call.key_scales = scales;
  call.value_scales = scales ? scales + heads : nullptr;
  call.kv_bits = static_cast<int32_t>(kv.kv_bits);
  call.num_tokens = num_tokens;
  call.num_heads = model_.num_heads;
  call.num_kv_heads = model_.num_kv_heads;
  call.head_dim = head_dim;
  call.capacity = kv.capacity;
  call.position = kv.position;
  call.window = layer.window;
  call.scale = attention_scale_;
  call.out = mixed;
  float *scratch = attention_.floats(attention_scratch_floats(call, num_threads(pool_)));
  if (scratch == nullptr) return -ENOMEM;
  attention(pool_, call, scratch);
  if (between_ != nullptr) between_->step();

  status = multiply(layer.output, mixed, num_tokens, layer.output_bias, projected);
  if (status != 0) return status;
  if (between_ != nullptr) between_->step();
  parallel_for(pool_, num_tokens, [&](int64_t t, int) {
    float *row = x + t * hidden;
    level.add(projected + t * hidden, hidden, row);
    level.rms_norm(row, layer.post_norm, hidden, model_.rms_eps, normed + t * hidden);
  });
  return layer.router.rows == 0 ? 0 : route(number, normed, num_tokens, token_ids, ids, weights);
}

int32_t Decoder::mlp(int64_t number, int64_t num_tokens, const float *normed) {
  const em_block &layer = layers_[number];
  if (layer.down.rows == 0) return 0;
  const int64_t width = layer.down.cols, hidden = model_.hidden;
  const int64_t rows[2] = {width, width};
  float *gate_up_buffer = gate_up_.floats(num_tokens * 3 * width);
  float *result = mlp_.floats(num_tokens * hidden);
  float *shares = shares_.floats(num_tokens);
  if (!gate_up_buffer || !result || !shares) return -ENOMEM;
  Rows gate_up[2];
  int32_t status =
      multiply_all(layer.gate_up, 2, rows, normed, num_tokens, nullptr, gate_up_buffer, gate_up);
  if (status != 0) return status;
  float *h = gate_up_buffer + num_tokens * 2 * width;
  parallel_for(pool_, num_tokens, [&](int64_t t, int) {
    kernels().silu_mul(gate_up[0].row(t), gate_up[1].row(t), width, h + t * width);
  });
  status = multiply(layer.down, h, num_tokens, nullptr, result);
  if (status != 0 || layer.shared_weight.rows == 0) return status;
  status = multiply(layer.shared_weight, normed, num_tokens, nullptr, shares);
  for (int64_t t = 0; t < num_tokens; ++t) shares[t] = row_kernels().sigmoid(shares[t]);
  return status;
}

void Decoder::add(int64_t number, int64_t num_tokens, float *y, float *x) {
  const em_block &layer = layers_[number];
  const int64_t hidden = model_.hidden;
  const float *result = layer.down.rows ? mlp_.floats(0) : nullptr;
  const float *shares = layer.shared_weight.rows ? shares_.floats(0) : nullptr;
  parallel_for(pool_, num_tokens, [&](int64_t t, int) {
    const float *mlp_row = result ? result + t * hidden : nullptr;
    if (y == nullptr) return row_kernels().add(mlp_row, hidden, x + t * hidden);
    float *row = y + t * hidden;
    if (mlp_row) kernels().add_scaled(shares ? shares[t] : 1.0f, mlp_row, hidden, row);
    row_kernels().add(row, hidden, x + t * hidden);
  });
}

}  // namespace em
