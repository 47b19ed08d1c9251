// Where a sequence lies in its tensors: fixed, packed, partly used, left-padded and paged, resolved once per sequence.
// Lengths and page numbers are clamped, so that no table can lead outside the tensors.
#pragma once

#include "base.h"
#include "mask.h"
#include "params.h"

namespace strobe {

struct SeqInfo {
  i64 batch;               // index of the sequence
  i64 seqlen_q, seqlen_k;  // query rows and keys that take part
  i64 rows_q, rows_k;      // rows that the tensors hold for it, used or not
  i64 q_batch, q_begin;    // batch entry and first row in q
  i64 k_batch, k_begin;    // batch entry and first row in k and v, left padding skipped
  i64 leftpad;
  const i32* pages;  // this sequence's row of the page table, or null
  i64 page_size, max_pages, num_pages;

  // Into [0, last].
  STROBE_HD static i64 clamp(i64 value, i64 last) { return max<i64>(0, min<i64>(value, last)); }

  STROBE_HD static SeqInfo of(const AttnParams& p, i64 b) {
    SeqInfo s;
    s.batch = b;
    s.q_batch = p.cu_seqlens_q ? 0 : b;
    s.q_begin = p.cu_seqlens_q ? clamp(p.cu_seqlens_q[b], p.total_q) : 0;
    s.rows_q = p.cu_seqlens_q ? clamp(p.cu_seqlens_q[b + 1] - s.q_begin, p.total_q - s.q_begin) : p.seqlen_q;
    s.seqlen_q = p.seqused_q ? clamp(p.seqused_q[b], s.rows_q) : s.rows_q;

    s.leftpad = p.leftpad_k ? max<i64>(0, p.leftpad_k[b]) : 0;
    s.k_batch = p.cu_seqlens_k ? 0 : p.cache_batch_idx ? clamp(p.cache_batch_idx[b], p.cache_rows - 1) : b;
    s.k_begin = 0;
    s.rows_k = p.seqlen_k;
    if (p.cu_seqlens_k && p.page_size) {  // the table says where, these only how many
      s.rows_k = clamp(p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b], p.seqlen_k);
    } else if (p.cu_seqlens_k) {
      s.k_begin = clamp(p.cu_seqlens_k[b], p.total_k);
      s.rows_k = clamp(p.cu_seqlens_k[b + 1] - s.k_begin, p.total_k - s.k_begin);
    }
    const i64 used = p.seqused_k ? p.seqused_k[b] + p.seqlen_new : s.rows_k;
    s.seqlen_k = max<i64>(0, min(used, s.rows_k) - s.leftpad);
    s.k_begin += s.leftpad;

    s.pages = p.page_size ? p.page_table + b * p.page_table_stride : nullptr;
    s.page_size = p.page_size;
    s.max_pages = p.max_pages;
    s.num_pages = p.num_pages;
    return s;
  }

  // Element offset of query row i, head h in q, out, dout or dq.
  STROBE_HD i64 q_index(const Rows& rows, i64 i, i64 h) const {
    return q_batch * rows.batch_stride + (q_begin + i) * rows.row_stride + h * rows.head_stride;
  }

  // Element offset of key j, head h in k, v, dk or dv.
  STROBE_HD i64 k_index(const Rows& rows, i64 j, i64 h) const {
    if (!pages) return k_batch * rows.batch_stride + (k_begin + j) * rows.row_stride + h * rows.head_stride;
    const i64 row = j + leftpad;
    const i64 column = min(row / page_size, max_pages - 1);
    const i64 page = max<i64>(0, min<i64>(pages[column], num_pages - 1));
    return page * rows.batch_stride + (row % page_size) * rows.row_stride + h * rows.head_stride;
  }

  // Offset of query row i, head h in lse and dlse.
  STROBE_HD i64 lse_index(const AttnParams& p, i64 i, i64 h) const {
    return q_batch * p.lse_batch_stride + h * p.lse_head_stride + q_begin + i;
  }
};

STROBE_HD Mask mask_of(const AttnParams& p, const SeqInfo& s) {
  const bool decode = p.force_fa_decode && s.seqlen_q == 1;
  Mask mask;
  mask.seqlen_q = s.seqlen_q;
  mask.seqlen_k = s.seqlen_k;
  mask.left = p.window_left < 0 || decode ? kUnbounded : p.window_left;
  mask.right = p.causal ? 0 : p.window_right < 0 ? kUnbounded : p.window_right;
  mask.keep_first = p.keep_first;
  mask.full_from = p.full_from ? p.full_from[s.batch] : kUnbounded;
  return mask;
}

}  // namespace strobe
