#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "host/check_arguments.h"

namespace strobe::host {
namespace {

void check_scalars(const Arguments& a, AttnParams& p) {
  const Call& call = a.call;
  const strobe_args& args = a.args;
  const double scale = args.has_softmax_scale ? args.softmax_scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  p.scale = static_cast<float>(scale);
  if (!std::isfinite(p.scale)) [[unlikely]] {
    call.refuse_value({}, "softmax_scale is %g, allowed is any finite f32", scale);
  }
  p.softcap = static_cast<float>(args.softcap);
  if (!(args.softcap >= 0) || !std::isfinite(p.softcap)) [[unlikely]] {
    call.refuse_value({}, "softcap is %g, allowed is 0 (off) or any finite positive f32", args.softcap);
  }
  p.dropout_p = static_cast<float>(args.dropout_p);
  if (!(args.dropout_p >= 0 && p.dropout_p < 1.f)) [[unlikely]] {
    call.refuse_value({}, "dropout_p is %g, allowed is [0, 1)", args.dropout_p);
  }
  if (args.softcap > 0 && args.dropout_p > 0) [[unlikely]] {
    call.refuse_value({}, "softcap is %g and dropout_p is %g, allowed is one of them", args.softcap, args.dropout_p);
  }
  p.seed = args.seed;
  p.offset = args.offset;
}

void check_mask(const Arguments& a, AttnParams& p) {
  const strobe_args& args = a.args;
  if (args.window_left < -1 || args.window_right < -1) [[unlikely]] {
    a.call.refuse_value({}, "window_size is (%lld, %lld), allowed is at least 0, or -1 for no bound",
                        static_cast<long long>(args.window_left), static_cast<long long>(args.window_right));
  }
  if (args.keep_first < 0) [[unlikely]] {
    a.call.refuse_value({}, "keep_first is %lld, allowed is at least 0", static_cast<long long>(args.keep_first));
  }
  p.causal = args.causal != 0;
  p.window_left = std::min<i64>(args.window_left, kUnbounded);
  p.window_right = p.causal ? 0 : std::min<i64>(args.window_right, kUnbounded);
  p.keep_first = std::min<i64>(args.keep_first, kUnbounded);
  p.force_fa_decode = args.force_fa_decode != 0;
}

void check_alibi(const Arguments& a, AttnParams& p) {
  if (!a.args.alibi_slopes) return;
  const Named slopes{"alibi_slopes", a.args.alibi_slopes};
  if (slopes->ndim == 2) {
    check_tensor(a.call, slopes, a.q, STROBE_FLOAT32, {p.batch, p.num_heads}, "[num_heads] or [batch, num_heads]");
    p.alibi_batch_stride = slopes->stride[0];
  } else {
    check_tensor(a.call, slopes, a.q, STROBE_FLOAT32, {p.num_heads}, "[num_heads] or [batch, num_heads]");
  }
  p.alibi_slopes = static_cast<const float*>(slopes->data);
}

float from_bf16(u16 bits) { return std::bit_cast<float>(static_cast<u32>(bits) << 16); }

float from_f16(u16 bits) {
  const u32 sign = static_cast<u32>(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 0x1f;
  const u32 mantissa = bits & 0x3ff;
  float magnitude;
  if (exponent == 0x1f) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude = exponent ? std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25)
                         : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return sign ? -magnitude : magnitude;
}

void check_s_aux(const Arguments& a, AttnParams& p, std::string& storage) {
  if (!a.args.s_aux) return;
  const Named sinks{"s_aux", a.args.s_aux};
  check_device(a.call, sinks, a.q);
  if (!is_float(sinks->dtype)) [[unlikely]] {
    a.call.refuse_type({sinks}, "s_aux is %s, allowed is f32, f16 or bf16", dtype_name(sinks->dtype));
  }
  check_tensor(a.call, sinks, a.q, sinks->dtype, {p.num_heads}, "[num_heads]");
  if (sinks->dtype == STROBE_FLOAT32) {
    p.s_aux = static_cast<const float*>(sinks->data);
    return;
  }
  if (a.on_gpu()) [[unlikely]] {
    a.call.refuse_unsupported({sinks}, "s_aux is %s, allowed on a GPU is f32", dtype_name(sinks->dtype));
  }
  // No string's inline buffer is known to be aligned for floats: make it one on the heap.
  storage.reserve(64);
  storage.resize(static_cast<size_t>(p.num_heads) * sizeof(float));
  const u16* bits = static_cast<const u16*>(sinks->data);
  for (i64 h = 0; h < p.num_heads; ++h) {
    const float value = sinks->dtype == STROBE_BFLOAT16 ? from_bf16(bits[h]) : from_f16(bits[h]);
    std::memcpy(storage.data() + static_cast<size_t>(h) * sizeof(float), &value, sizeof value);
  }
  p.s_aux = reinterpret_cast<const float*>(storage.data());
}

}  // namespace

void check_options(const Arguments& a, AttnParams& params, std::string& s_aux_storage) {
  check_scalars(a, params);
  check_mask(a, params);
  check_alibi(a, params);
  check_s_aux(a, params, s_aux_storage);
  const char* backend = a.args.backend;
  if (!backend || std::strcmp(backend, "auto") == 0) return;
  if (!a.on_gpu()) {
    if (std::strcmp(backend, "cpu") == 0) return;
    a.call.refuse_value({}, "backend is '%.80s', allowed is 'auto' or 'cpu'", backend);
  }
  if (std::strcmp(backend, "sm80") == 0)
    params.engine = Engine::sm80;
  else if (std::strcmp(backend, "sm90") == 0)
    params.engine = Engine::sm90;
  else
    a.call.refuse_value({}, "backend is '%.80s', allowed for tensors on a GPU is 'auto', 'sm80' or 'sm90'", backend);
}

}  // namespace strobe::host
