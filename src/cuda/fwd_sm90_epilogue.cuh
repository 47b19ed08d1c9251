// The end of a work item of fwd_sm90: LSE, or a partial result's state, and rows, which leave from registers, 16 bytes
// a lane, or by tensor copies from shared memory (Staging).
#pragma once

#include "core/softmax.h"
#include "cuda/fwd_sm90_work.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tile/softmax_sm90.cuh"

namespace strobe {

// Four registers of four lanes that share rows, transposed: lane q gets register q of each of them.
__device__ __forceinline__ void transpose_quad(u32 (&x)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  u32 a = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  if (odd)
    x[0] = a, x[2] = b;
  else
    x[1] = a, x[3] = b;
  a = __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
  if (high)
    x[0] = a, x[1] = b;
  else
    x[2] = a, x[3] = b;
}

// Of the two rows that a lane shares, the one that it finishes. row0: of the warp, in the tile.
template <FwdSm90Config C>
struct Sm90Row {
  i32 token, head;  // head: within the group
  i32 behind;       // the tile's first token

  __device__ __forceinline__ Sm90Row(const FwdSm90Launch& launch, const Sm90Work& work, int row0) {
    const i32 in_tile = row0 + Fragment<16, 8>::row(lane_id() % 2), row = work.head.first_row + in_tile;
    token = C.pack ? i32(launch.group.quotient(u32(row))) : row;
    head = C.pack ? row - token * i32(launch.group.divisor) : 0;
    behind = C.pack ? token - i32(launch.group.quotient(u32(work.head.first_row))) : in_tile;
  }
};

// finalize() by approximate functions: the exact ones, a chain of some 70 instructions, would run at every item's end
// with nothing beside them. `sum` is 0 in rows that saw nothing, and else not small: a term was 1 when the reference
// moved last.
__device__ __forceinline__ RowResult finalize_approx(const RowState& row, const float* sink) {
  if (row.sum == 0.f) return {0.f, sink ? *sink : kInfinity};
  float max_score = row.max, sum = row.sum, factor = 1.f;
  if (sink) {
    max_score = max(row.max, *sink);
    factor = ptx::ex2((row.max - max_score) * kLog2e);
    sum = sum * factor + ptx::ex2((*sink - max_score) * kLog2e);
  }
  return {factor * ptx::rcp(sum), max_score + ptx::lg2(sum) * kLn2};
}

// Writes LSE, or a partial result's state. scale: by which the output is to be multiplied; a partial output is written
// as it is, but not where scale is 0: the merge reads nothing of a row that saw no key.
template <FwdSm90Config C>
__device__ __forceinline__ void finish_state(float (&scale)[2], Sm90Softmax& softmax, const FwdSm90Launch& launch,
                                             const Sm90Work& work, int row0) {
  const AttnParams& p = launch.p;
  const i32 used_q = work.mask.seqlen_q, rows_q = work.rows_q;
  i64 lse_at = work.lse;
  if constexpr (C.split == 0) ptx::opaque(lse_at);  // read here, not where it is needed
#pragma unroll
  for (int r = 0; r < 2; ++r) softmax.sum[r] = row_sum(softmax.sum[r]);

  const int mine = lane_id() % 2;
  RowState state = {(mine ? softmax.reference[1] : softmax.reference[0]) * kLn2,
                    mine ? softmax.sum[1] : softmax.sum[0]};
  if (C.split && state.sum == 0.f) state.max = kNegInfinity;
  const Sm90Row<C> row(launch, work, row0);
  const bool writes = lane_id() % 4 == mine;
  float factor = 0.f;

  if constexpr (C.split != 0) {
    const i64 at = work.out + row.head * p.total_q + row.token;
    if (writes && row.token < used_q)
      *reinterpret_cast<float2*>(launch.partial_state + at * 2) = make_float2(state.max, state.sum);
    if (row.token < used_q && state.sum != 0.f) factor = 1.f;
  } else {
    RowResult result = {0.f, kInfinity};
    if (row.token < used_q) result = finalize_approx(state, p.s_aux ? p.s_aux + work.head_q + row.head : nullptr);
    if (p.lse && writes && row.token < rows_q)
      p.lse[lse_at + (C.pack ? row.head * p.lse_head_stride : 0) + row.behind] = result.lse;
    factor = result.scale;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) scale[r] = __shfl_sync(0xffffffffu, factor, r, 4);
}

// A row that saw nothing is 0 whatever lies in out.
template <int kD>
__device__ __forceinline__ void clear_unseen(Fragment<16, kD>& out, const float (&scale)[2]) {
  if (!__any_sync(0xffffffffu, scale[0] == 0.f || scale[1] == 0.f)) return;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < Fragment<16, kD>::kCols; ++c)
      if (scale[r] == 0.f) out.at(r, c) = 0.f;
}

// Stages the warp's rows in its part of the warpgroup's place, from where a tensor copy takes them: the elected
// lane knows when they are read (tma_store_wait_read). Where the next sequence's rows lie behind the last ones, lanes
// write those.
template <FwdSm90Config C, int kD>
__device__ __forceinline__ void stage_rows(Fragment<16, kD>& out, const float (&scale)[2], const FwdSm90Launch& launch,
                                           const Sm90Work& work, int row0, u32 place) {
  constexpr DType kType = DType(C.dtype);
  constexpr int kPanels = panels(C.head_dim_v);
  using Tile = SmemTile<64, kPanels * 64>;
  clear_unseen(out, scale);
  const AttnParams& p = launch.p;
  const i32 group = C.pack ? i32(launch.group.divisor) : 1;
  const i32 row = work.head.first_row + row0, token = C.pack ? i32(launch.group.quotient(u32(row))) : row;
  const i32 first_token = C.pack ? i32(launch.group.quotient(u32(work.head.first_row))) : work.head.first_row;
  const i32 head = row - token * group;  // of the first row: others follow it where a group has more than kStagedRows
  // Of the warp's rows, once more: kept through the item it would be a spilled word.
  const u32 at = u32(__shfl_sync(0xffffffffu, int(threadIdx.x % 128 / 32), 0)) * 16 * 128;
  const Tile tile = {place + at};
  const u32 lane_at = lane_address_m(tile);
#pragma unroll
  for (int n = 0; n < kD / 8; n += 2) {
    u32 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = &out.x[0][n + i / 2][i % 2 * 2];
      x[i] = ptx::cvt_pair<kType>(pair[0] * scale[i % 2], pair[1] * scale[i % 2]);
    }
    ptx::stmatrix_x4(Tile::moved(lane_at, 0, n * 8), x);
  }
  ptx::fence_proxy_async();  // each lane's own writes, for the copy and for the copy of queries that comes here next
  __syncwarp();
  if (!C.packed || row + kStagedRows <= work.rows_q * group) {
    if (ptx::elect()) {
#pragma unroll
      for (int c = 0; c < kPanels; ++c)
        ptx::tma_store(launch.out, tile.base + u32(c * 64 * 128), c * 64, work.head_q + (C.pack ? head : 0),
                       work.q_row + token - first_token, work.q_batch);
      ptx::tma_store_commit();
    }
    return;
  }
  constexpr int kChunks = C.head_dim_v / 8;
#pragma unroll 1
  for (int at = lane_id(); at < kStagedRows * kChunks; at += 32) {
    const i32 r = at / kChunks, col = (at - r * kChunks) * 8;
    const i32 own = C.pack ? i32(launch.group.quotient(u32(row + r))) : row + r;
    if (own >= work.rows_q) break;
    const i64 offset = work.out + (own - first_token) * p.out.row_stride +
                       (C.pack ? (row + r - own * group) * p.out.head_stride : 0) + col;
    *reinterpret_cast<uint4*>(static_cast<u16*>(p.out.data) + offset) = ptx::ld_shared_16(tile.address(r, col));
  }
  __syncwarp();  // all of them are read
}

template <FwdSm90Config C, int kD>
__device__ __forceinline__ void write_rows(Fragment<16, kD>& out, const float (&scale)[2], const FwdSm90Launch& launch,
                                           const Sm90Work& work, int row0) {
  using Output = Fragment<16, kD>;
  constexpr DType kType = DType(C.dtype);
  const AttnParams& p = launch.p;
  const Sm90Row<C> row(launch, work, row0);
  if constexpr (C.split != 0) {
    const i64 at = work.out + row.head * p.total_q + row.token;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const i64 row_at = __shfl_sync(0xffffffffu, at, r, 4);
      if (scale[r] == 0.f) continue;
      float* const to = launch.partial_out + row_at * C.head_dim_v;
#pragma unroll
      for (int c = 0; c < Output::kCols; c += 2)
        if (Output::col(c) < C.head_dim_v)
          *reinterpret_cast<float2*>(to + Output::col(c)) = make_float2(out.at(r, c), out.at(r, c + 1));
    }
  } else {
    clear_unseen(out, scale);
    const i64 offset = work.out + row.behind * p.out.row_stride + (C.pack ? row.head * p.out.head_stride : 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u16* const to = static_cast<u16*>(p.out.data) + __shfl_sync(0xffffffffu, offset, r, 4);
      const bool exists = __shfl_sync(0xffffffffu, i32(row.token < work.rows_q), r, 4);
#pragma unroll
      for (int g = 0; g < (kD + 31) / 32; ++g) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = g * 4 + i;  // eight columns
          x[i] = 0;
          if (n < kD / 8 && n * 8 < C.head_dim_v)
            x[i] = ptx::cvt_pair<kType>(out.x[0][n][2 * r] * scale[r], out.x[0][n][2 * r + 1] * scale[r]);
        }
        transpose_quad(x);
        const int col = g * 32 + lane_id() % 4 * 8;
        if (exists && col < C.head_dim_v) *reinterpret_cast<uint4*>(to + col) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

}  // namespace strobe
