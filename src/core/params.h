// What an engine receives: pointers, strides and options after every check. No field needs validation any more.
#pragma once

#include "base.h"

namespace strobe {

// A [batch, seqlen, heads, dim], [total, heads, dim] (batch_stride 0) or [page, row, heads, dim] tensor.
// Strides count elements; dim has stride 1.
struct Rows {
  void* data = nullptr;
  i64 batch_stride = 0;  // of a batch entry, or of a page
  i64 row_stride = 0;
  i64 head_stride = 0;
};

// Which kernels compute a call on a GPU: the planner's choice, or the caller's.
enum class Engine : i32 { any, sm80, sm90 };

struct AttnParams {
  Rows q;                // [batch, seqlen_q, num_heads, head_dim]
  Rows k;                // [batch, seqlen_k, num_heads_k, head_dim]
  Rows v;                // [batch, seqlen_k, num_heads_v, head_dim_v]
  Rows out;              // [batch, seqlen_q, num_heads, head_dim_v]
  float* lse = nullptr;  // [batch, num_heads, seqlen_q], packed: [num_heads, total_q]; may be null in forward
  i64 lse_batch_stride = 0, lse_head_stride = 0;

  DType dtype = DType::f32;
  Engine engine = Engine::any;
  i64 batch = 0;
  i64 num_heads = 0, num_heads_k = 0, num_heads_v = 0;
  i64 head_dim = 0, head_dim_v = 0;

  // Sequences (seqlen.h resolves them).
  i64 seqlen_q = 0;  // fixed: the length; packed: the largest length, or a bound of it
  // Fixed: the length or the cache's capacity; packed: as seqlen_q; paged: max_pages * page_size.
  i64 seqlen_k = 0;
  i64 total_q = 0;                       // rows of q in all (batch * seqlen_q where fixed)
  i64 total_k = 0;                       // packed: rows of k in all
  i64 cache_rows = 0;                    // with cache_batch_idx: batch entries of k
  const i32* cu_seqlens_q = nullptr;     // [batch + 1]
  const i32* cu_seqlens_k = nullptr;     // [batch + 1]
  const i32* seqused_q = nullptr;        // [batch]
  const i32* seqused_k = nullptr;        // [batch]
  i64 seqlen_new = 0;                    // keys appended behind seqused_k by this call
  const i32* leftpad_k = nullptr;        // [batch]
  const i32* cache_batch_idx = nullptr;  // [batch]
  const i32* page_table = nullptr;       // [batch, page_table_stride]
  i64 page_table_stride = 0;
  i64 max_pages = 0;  // columns of page_table
  i64 page_size = 0;  // 0: not paged
  i64 num_pages = 0;

  // Mask.
  bool causal = false;
  i64 window_left = -1, window_right = -1;  // -1: unbounded
  i64 keep_first = 0;
  bool force_fa_decode = false;
  const i32* full_from = nullptr;  // [batch]

  // Score.
  float scale = 1.f;
  float softcap = 0.f;                  // 0: off
  const float* alibi_slopes = nullptr;  // [num_heads], or [batch, num_heads] with alibi_batch_stride
  i64 alibi_batch_stride = 0;
  const float* s_aux = nullptr;  // [num_heads], natural-log units

  float dropout_p = 0.f;
  u64 seed = 0, offset = 0;
};

struct BackwardParams {
  AttnParams fwd;  // out and lse are inputs here
  Rows dout;
  const float* dlse = nullptr;  // laid out as lse; may be null
  Rows dq, dk, dv;
  float* ds_aux = nullptr;     // [num_heads]; null without s_aux
  bool deterministic = false;  // bitwise the same on every run
};

// Appends k_new and v_new at seqused_k, turning q and k_new by rotary position first; attention follows.
struct KVCacheParams {
  AttnParams fwd;
  Rows k_new, v_new;                 // [batch, seqlen_new, heads, dim]; data null: nothing to append
  const void* rotary_cos = nullptr;  // [seqlen_ro, rotary_dim / 2], dtype of q, contiguous
  const void* rotary_sin = nullptr;
  i64 rotary_dim = 0;  // 0: no rotary
  i64 seqlen_ro = 0;
  bool rotary_interleaved = true;
};

}  // namespace strobe
