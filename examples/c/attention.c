/* Causal attention with a window of 8 keys and 2 kept tokens, through the C ABI, checked against two plain loops. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "strobe/strobe.h"

enum { kSeqlen = 50, kHeads = 2, kDim = 16, kWindow = 8, kKeep = 2 };

static strobe_tensor tensor(float* data) {
  strobe_tensor t = {0};
  t.data = data;
  t.dtype = STROBE_FLOAT32;
  t.device = STROBE_CPU;
  t.ndim = 4;
  const int64_t shape[4] = {1, kSeqlen, kHeads, kDim};
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    t.shape[d] = shape[d];
    t.stride[d] = stride;
    stride *= shape[d];
  }
  return t;
}

static float* at(float* data, int i, int h) { return data + (i * kHeads + h) * kDim; }

static double plain_attention(float* q, float* k, float* v, int i, int h, int d) {
  double sum = 0., out = 0.;
  for (int j = 0; j <= i; ++j) {
    if (j < i - kWindow && j >= kKeep) continue;
    double score = 0.;
    for (int x = 0; x < kDim; ++x) score += at(q, i, h)[x] * at(k, j, h)[x];
    const double weight = exp(score / sqrt(kDim));
    sum += weight;
    out += weight * at(v, j, h)[d];
  }
  return out / sum;
}

int main(void) {
  enum { kSize = kSeqlen * kHeads * kDim };
  static float q[kSize], k[kSize], v[kSize], out[kSize];
  for (int n = 0; n < kSize; ++n) {
    q[n] = (float)rand() / (float)RAND_MAX - 0.5f;
    k[n] = (float)rand() / (float)RAND_MAX - 0.5f;
    v[n] = (float)rand() / (float)RAND_MAX - 0.5f;
  }
  const strobe_tensor tq = tensor(q), tk = tensor(k), tv = tensor(v), tout = tensor(out);
  strobe_args args;
  strobe_args_init(&args);
  args.q = &tq;
  args.k = &tk;
  args.v = &tv;
  args.out = &tout;
  args.causal = 1;
  args.window_left = kWindow;
  args.keep_first = kKeep;
  if (strobe_forward(&args) != STROBE_OK) {
    fprintf(stderr, "%s\n", strobe_last_error());
    return 1;
  }
  double worst = 0.;
  for (int i = 0; i < kSeqlen; ++i)
    for (int h = 0; h < kHeads; ++h)
      for (int d = 0; d < kDim; ++d) worst = fmax(worst, fabs(at(out, i, h)[d] - plain_attention(q, k, v, i, h, d)));
  printf("strobe %s on %s: largest difference from the plain loops %.1e\n", strobe_version(), strobe_cpu_isa(), worst);
  return worst < 1e-6 ? 0 : 1;
}
