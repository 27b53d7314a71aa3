/* One token through some experts of a layer, from a store and without Python: see embedding.md.
 *
 *   decode_layer NAME.edgemoe
 */
#include <stdio.h>
#include <stdlib.h>

#include "edgemoe_core.h"

enum { NUM_EXPERTS = 4, NUM_THREADS = 2 };

static int stop(const char *what, const char *why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  return 1;
}

int main(int argc, char **argv) {
  char error[256], code[32];
  int32_t status = 0, keys[NUM_EXPERTS], tokens[NUM_EXPERTS];
  int64_t begin[NUM_EXPERTS + 1] = {0};
  float weights[NUM_EXPERTS];
  void *slots[NUM_EXPERTS];

  const em_index *index = em_index_open(argc > 1 ? argv[1] : "", error, sizeof error);
  if (index == NULL) return stop("no store", error);
  if (index->num_layers == 0 || index->layers[0].num_experts < NUM_EXPERTS)
    return stop(argv[1], "its first layer has too few experts");
  const em_layer layer = index->layers[0];

  em_store *store = em_store_open(index->experts_path, index->records, index->num_records,
                                  4, 0, EM_METHOD_AUTO, &status);
  snprintf(code, sizeof code, "code %d", (int)status);
  if (store == NULL) return stop(index->experts_path, code);
  const int64_t slot_bytes = index->max_record_bytes; /* a multiple of 4096 */
  char *arena = em_arena_create(NUM_EXPERTS * slot_bytes);
  em_pool *pool = em_pool_create(NUM_THREADS);
  float *x = malloc(index->hidden * sizeof *x), *y = calloc(index->hidden, sizeof *y);
  float *workspace = malloc(sizeof *workspace *
                            em_moe_workspace_floats(1, NUM_EXPERTS, index->hidden, layer.width));
  if (!arena || !pool || !x || !y || !workspace) return stop("no memory", argv[1]);

  for (int64_t i = 0; i < index->hidden; ++i) x[i] = (float)(i * 37 % 101 - 50) / 50;
  for (int e = 0; e < NUM_EXPERTS; ++e) { /* a router would choose the experts and their weights */
    keys[e] = em_index_key(index, layer.layer, e);
    slots[e] = arena + e * slot_bytes;
    tokens[e] = 0;
    weights[e] = 1.0f / NUM_EXPERTS;
    begin[e + 1] = e + 1;
  }
  if (em_store_submit(store, NUM_EXPERTS, keys, slots, 0) != 0) return stop("submit", argv[1]);
  em_moe_args args = {.num_tokens = 1, .hidden = index->hidden, .width = layer.width,
                      .num_experts = NUM_EXPERTS, .x = x, .y = y, .keys = keys,
                      .data = (const uint8_t *const *)slots, .pair_begin = begin,
                      .pair_token = tokens, .pair_weight = weights, .workspace = workspace};
  status = em_moe_run(pool, store, NULL, &args); /* computes each expert as it lands */
  snprintf(code, sizeof code, "code %d", (int)status);
  if (status != 0) return stop("the layer could not be computed", code);
  printf("layer %lld of %lld, isa %s, y[0] %g, crc32c %08x\n", (long long)layer.layer,
         (long long)index->num_layers, em_isa(), y[0],
         (unsigned)em_crc32c(0, y, index->hidden * (int64_t)sizeof *y));

  free(workspace), free(y), free(x);
  em_pool_destroy(pool);
  em_store_close(store); /* before the memory that it writes to */
  em_arena_destroy(arena, NUM_EXPERTS * slot_bytes);
  em_index_close(index);
  return 0;
}
