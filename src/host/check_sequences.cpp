#include <algorithm>
#include <vector>

#include "host/check_arguments.h"

namespace strobe::host {
namespace {

const i32* values_of(Named tensor) { return tensor ? static_cast<const i32*>(tensor->data) : nullptr; }

// Bounds of packed sequences: [0, ..not decreasing.., total]. Returns the largest length, or a bound of it.
i64 check_cu_seqlens(const Arguments& a, Named cu, Named total_of, i64 total) {
  const Call& call = a.call;
  if (a.on_gpu()) return total;
  const i32* at = values_of(cu);
  const i64 batch = cu->shape[0] - 1;
  if (at[0] != 0) [[unlikely]]
    call.refuse_value({cu}, "%s begins with %d, allowed is 0", cu.name, at[0]);
  i64 longest = 0;
  for (i64 b = 0; b < batch; ++b) {
    if (at[b + 1] < at[b]) [[unlikely]] {
      call.refuse_value({cu}, "%s decreases from %d to %d at index %lld, allowed is not decreasing", cu.name, at[b],
                        at[b + 1], b + 1);
    }
    longest = std::max<i64>(longest, at[b + 1] - at[b]);
  }
  // Pages hold what they hold: only packed keys have a total.
  if (total_of && at[batch] != total) [[unlikely]] {
    call.refuse_value({cu, total_of}, "%s ends with %d, allowed is the total length %lld of %s", cu.name, at[batch],
                      total, total_of.name);
  }
  return longest;
}

void check_cu_shape(const Arguments& a, Named cu) {
  check_device(a.call, cu, a.q);
  check_dtype(a.call, cu, STROBE_INT32, "");
  check_rank(a.call, cu, 1, "[batch + 1]");
  if (cu->shape[0] < 1) [[unlikely]] {
    a.call.refuse_value({cu}, "%s is empty, allowed is [batch + 1]", cu.name);
  }
  check_memory(a.call, cu);
}

void check_max_seqlen(const Arguments& a, const char* name, int64_t given, i64 longest) {
  if (given < -1) [[unlikely]] {
    a.call.refuse_value({}, "%s is %lld, allowed is at least 0, or -1 for not given", name,
                        static_cast<long long>(given));
  }
  if (given >= 0 && given < longest && !a.on_gpu()) [[unlikely]] {
    a.call.refuse_value({}, "%s is %lld, allowed is at least the longest sequence's %lld", name,
                        static_cast<long long>(given), longest);
  }
}

// Where lengths are on a GPU, the caller's bound is all that is known of them.
i64 bounded(const Arguments& a, i64 longest, int64_t given) {
  return a.on_gpu() && given >= 0 ? std::min<i64>(longest, given) : longest;
}

// Rows that the tensor holds for sequence b.
i64 capacity(const i32* cu, i64 b, i64 fixed) { return cu ? cu[b + 1] - cu[b] : fixed; }

void check_used(const Arguments& a, Named used, const i32* cu, i64 batch, i64 fixed) {
  check_index(a.call, used, a.q, {batch}, "[batch]");
  if (a.on_gpu()) return;
  const i32* at = values_of(used);
  for (i64 b = 0; b < batch; ++b) {
    const i64 most = capacity(cu, b, fixed);
    if (at[b] < 0 || at[b] > most) [[unlikely]] {
      a.call.refuse_value({used, a.q, a.k}, "%s[%lld] is %d, allowed is 0 to %lld", used.name, b, at[b], most);
    }
  }
}

void check_leftpad(const Arguments& a, const AttnParams& p) {
  check_index(a.call, a.leftpad_k, a.q, {p.batch}, "[batch]");
  if (a.on_gpu()) return;
  for (i64 b = 0; b < p.batch; ++b) {
    const i64 most = p.seqused_k ? p.seqused_k[b] : capacity(p.cu_seqlens_k, b, p.seqlen_k);
    if (p.leftpad_k[b] < 0 || p.leftpad_k[b] > most) [[unlikely]] {
      a.call.refuse_value({a.leftpad_k, a.k}, "%s[%lld] is %d, allowed is 0 to the %lld keys used", a.leftpad_k.name, b,
                          p.leftpad_k[b], most);
    }
  }
}

void check_page_table(const Arguments& a, AttnParams& p) {
  const Named table = a.page_table;
  check_device(a.call, table, a.q);
  check_dtype(a.call, table, STROBE_INT32, "");
  check_rank(a.call, table, 2, "[batch, max_pages]");
  if (table->shape[0] != p.batch) [[unlikely]] {
    a.call.refuse_value({table, a.q}, "page_table has %lld rows, allowed is the batch, %lld",
                        static_cast<long long>(table->shape[0]), p.batch);
  }
  check_memory(a.call, table);
  p.page_table = values_of(table);
  p.page_table_stride = table->stride[0];
  p.max_pages = table->shape[1];
  p.page_size = a.k->shape[1];
  p.num_pages = a.k->shape[0];
  p.seqlen_k = p.max_pages * p.page_size;
}

// Every page that a key in [leftpad, used) lies in exists. Needs all lengths to be checked.
void check_pages(const Arguments& a, const AttnParams& p) {
  for (i64 b = 0; b < p.batch; ++b) {
    const i64 used = p.seqused_k ? p.seqused_k[b] + p.seqlen_new : capacity(p.cu_seqlens_k, b, 0);
    const i64 columns = ceil_div(used, p.page_size);
    if (columns > p.max_pages) [[unlikely]] {
      a.call.refuse_value({a.page_table, a.k},
                          "page_table has %lld columns but sequence %lld has %lld keys, allowed is at least %lld",
                          p.max_pages, b, used, columns);
    }
    for (i64 column = p.leftpad_k ? p.leftpad_k[b] / p.page_size : 0; column < columns; ++column) {
      const i32 page = p.page_table[b * p.page_table_stride + column];
      if (page < 0 || page >= p.num_pages) [[unlikely]] {
        a.call.refuse_value({a.page_table, a.k}, "page_table[%lld][%lld] is %d, allowed is 0 to %lld", b, column, page,
                            p.num_pages - 1);
      }
    }
  }
}

void check_cache_rows(const Arguments& a, AttnParams& p) {
  if (a.paged) [[unlikely]] {
    a.call.refuse_value({a.cache_batch_idx, a.page_table},
                        "cache_batch_idx and page_table are both given, allowed is one of them");
  }
  check_index(a.call, a.cache_batch_idx, a.q, {p.batch}, "[batch]");
  const i64 rows = a.k->shape[0];
  p.cache_batch_idx = values_of(a.cache_batch_idx);
  if (a.on_gpu()) return;
  for (i64 b = 0; b < p.batch; ++b) {
    if (p.cache_batch_idx[b] < 0 || p.cache_batch_idx[b] >= rows) [[unlikely]] {
      a.call.refuse_value({a.cache_batch_idx, a.k}, "cache_batch_idx[%lld] is %d, allowed is 0 to %lld", b,
                          p.cache_batch_idx[b], rows - 1);
    }
  }
}

// First index of a value that occurs again, or -1. Short lists, the usual ones, need no memory.
i64 find_repeated(const i32* at, i64 n) {
  constexpr i64 kShort = 64;
  if (n <= kShort) {
    for (i64 i = 1; i < n; ++i) {
      for (i64 j = 0; j < i; ++j) {
        if (at[i] == at[j]) return j;
      }
    }
    return -1;
  }
  std::vector<i32> sorted(at, at + n);
  std::sort(sorted.begin(), sorted.end());
  const auto repeated = std::adjacent_find(sorted.begin(), sorted.end());
  return repeated == sorted.end() ? -1 : std::find(at, at + n, *repeated) - at;
}

}  // namespace

void check_sequences(const Arguments& a, AttnParams& p) {
  if (a.packed_q) {
    check_cu_shape(a, a.cu_seqlens_q);
    p.batch = a.cu_seqlens_q->shape[0] - 1;
    p.cu_seqlens_q = values_of(a.cu_seqlens_q);
    p.seqlen_q = bounded(a, check_cu_seqlens(a, a.cu_seqlens_q, a.q, a.q->shape[0]), a.args.max_seqlen_q);
  }
  check_max_seqlen(a, "max_seqlen_q", a.args.max_seqlen_q, p.seqlen_q);
  if (a.paged) check_page_table(a, p);
  // Callers of paged kernels pass any cu_seqlens_k beside seqused_k, which then holds the lengths.
  i64 longest_k = a.paged ? 0 : p.seqlen_k;
  if (a.cu_seqlens_k && !(a.paged && a.seqused_k)) {
    check_cu_shape(a, a.cu_seqlens_k);
    if (a.cu_seqlens_k->shape[0] != p.batch + 1) [[unlikely]] {
      a.call.refuse_value({a.cu_seqlens_q, a.cu_seqlens_k},
                          "cu_seqlens_k has %lld elements, allowed is %lld as cu_seqlens_q has",
                          static_cast<long long>(a.cu_seqlens_k->shape[0]), p.batch + 1);
    }
    p.cu_seqlens_k = values_of(a.cu_seqlens_k);
    const Named packed = a.packed_k ? a.k : Named{};
    longest_k = check_cu_seqlens(a, a.cu_seqlens_k, packed, a.k->shape[0]);
    if (a.packed_k) p.seqlen_k = bounded(a, longest_k, a.args.max_seqlen_k);
  }
  if (a.seqused_q) {
    check_used(a, a.seqused_q, p.cu_seqlens_q, p.batch, p.seqlen_q);
    p.seqused_q = values_of(a.seqused_q);
  }
  if (a.seqused_k) {
    check_used(a, a.seqused_k, p.cu_seqlens_k, p.batch, p.seqlen_k);
    p.seqused_k = values_of(a.seqused_k);
    for (i64 b = 0; b < p.batch && a.paged && !a.on_gpu(); ++b) longest_k = std::max<i64>(longest_k, p.seqused_k[b]);
  }
  check_max_seqlen(a, "max_seqlen_k", a.args.max_seqlen_k, longest_k);
  for (i64 b = 0; p.seqlen_new && b < p.batch && !a.on_gpu(); ++b) {
    if (p.seqused_k[b] + p.seqlen_new > p.seqlen_k) [[unlikely]] {
      a.call.refuse_value({a.seqused_k, a.k}, "%s[%lld] is %d and %lld keys are appended, allowed is up to %lld in all",
                          a.seqused_k.name, b, p.seqused_k[b], p.seqlen_new, p.seqlen_k);
    }
  }
  if (a.leftpad_k) {
    p.leftpad_k = values_of(a.leftpad_k);
    check_leftpad(a, p);
  }
  if (a.paged && !a.on_gpu()) check_pages(a, p);
  if (a.cache_batch_idx) check_cache_rows(a, p);
  if (a.full_from) {
    check_index(a.call, a.full_from, a.q, {p.batch}, "[batch]");
    p.full_from = values_of(a.full_from);
    for (i64 b = 0; b < p.batch && !a.on_gpu(); ++b) {
      if (p.full_from[b] < 0) [[unlikely]] {
        a.call.refuse_value({a.full_from}, "full_from[%lld] is %d, allowed is at least 0", b, p.full_from[b]);
      }
    }
  }
}

void check_append(const Arguments& a, const AttnParams& p) {
  if (!p.seqlen_new || a.on_gpu()) return;
  if (a.cache_batch_idx) {
    const i64 repeated = find_repeated(p.cache_batch_idx, p.batch);
    if (repeated >= 0) [[unlikely]] {
      a.call.refuse_value({a.cache_batch_idx},
                          "cache_batch_idx names row %d twice, allowed is once when keys are appended",
                          p.cache_batch_idx[repeated]);
    }
  }
  if (!a.paged || p.batch < 2) return;
  std::vector<i32> pages;
  for (i64 b = 0; b < p.batch; ++b) {
    const i64 last = (p.seqused_k[b] + p.seqlen_new - 1) / p.page_size;
    for (i64 column = p.seqused_k[b] / p.page_size; column <= last; ++column) {
      pages.push_back(p.page_table[b * p.page_table_stride + column]);
    }
  }
  const i64 repeated = find_repeated(pages.data(), static_cast<i64>(pages.size()));
  if (repeated >= 0) [[unlikely]] {
    a.call.refuse_value({a.page_table}, "page_table has page %d twice among those appended to, allowed is once",
                        pages[static_cast<size_t>(repeated)]);
  }
}

}  // namespace strobe::host
