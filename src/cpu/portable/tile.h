// fp32 tiles and the loops over them. The functions are compiled once per instruction set and picked when the library
// loads.
#pragma once

#include <vector>

#include "core/params.h"

namespace strobe::cpu {

constexpr i64 kLanes = 16;  // floats of the vectors that the loops are written in; rows of tiles are padded to them

constexpr i64 padded(i64 n) { return ceil_div(n, kLanes) * kLanes; }

// c[m, n] = (accumulate ? c : 0) + a[m, k] b[k, n]. Row m of a starts at a + m * a_row, its elements lie a_col apart.
// n_size, ldb and ldc are multiples of kLanes.
void gemm(i64 m_size, i64 n_size, i64 k_size, const float* a, i64 a_row, i64 a_col, const float* b, i64 ldb, float* c,
          i64 ldc, bool accumulate);

// out[r, c] = rows[r][c] for c < cols, 0 up to ld. `rows` point at elements of `dtype`.
void load_rows(DType dtype, const void* const* rows, i64 n_rows, i64 cols, float* out, i64 ld);
// out[c, r] = in[r, c]; columns from n_rows to ld are zeroed.
void transpose(const float* in, i64 in_ld, i64 n_rows, i64 cols, float* out, i64 ld);
void store_row(DType dtype, const float* in, float scale, i64 cols, void* out);

void scale_row(float* row, i64 n, float factor);
float max_of(const float* row, i64 n);
// row = exp(row - shift); returns the sum. exp is good to 2 ulp; -inf gives 0.
float exp_row(float* row, i64 n, float shift);

float widen(DType dtype, const void* element);
i64 element_size(DType dtype);

}  // namespace strobe::cpu
