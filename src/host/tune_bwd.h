// Tiles of the backward pass, the one that is tried first on top. A row may change speed, never results.
#pragma once

#include "core/config_bwd.h"
#include "host/plan.h"

namespace strobe::host {

struct BwdTile {
  int max_dim, max_dim_v;  // it takes head dims up to these, each rounded up to a multiple of 16
  int block_m, block_n;    // queries, keys
  int warps, warps_n, warps_dq;
  int stages_q, stages_do, blocks;
};

// clang-format off
inline constexpr BwdTile kBwdTiles[] = {
    // dim dim_v   m    n  warps n dq  q do  blocks
    {  32,   64,  64,  64,  4, 2, 2,  2, 2,  3},
    {  64,   64, 128, 128,  8, 4, 4,  2, 2,  1},
    {  64,   64, 128, 128,  8, 4, 4,  2, 1,  1},
    {  64,   64,  64,  64,  4, 2, 2,  2, 2,  1},
    {  64,  128,  96, 128,  8, 4, 2,  2, 2,  1},
    {  96,   96,  96, 128,  8, 4, 2,  2, 2,  1},
    { 128,  128,  64, 128,  8, 4, 2,  2, 2,  1},
    { 128,  128,  64, 128,  8, 4, 2,  1, 2,  1},
    { 128,  128,  64,  64,  8, 4, 2,  1, 1,  1},
    {  96,  192,  64, 128,  8, 4, 4,  2, 2,  1},
    { 192,  192,  64,  96,  8, 2, 4,  2, 2,  1},
    { 192,  192,  64,  96,  8, 2, 4,  1, 1,  1},
    { 128,  256,  64,  96,  8, 2, 2,  2, 2,  1},
    { 128,  256,  64,  96,  8, 2, 4,  1, 1,  1},
    { 256,  128,  64,  96,  8, 2, 2,  2, 2,  1},
    { 256,  128,  64,  96,  8, 2, 2,  1, 1,  1},
    { 256,  256,  64,  64,  8, 2, 2,  2, 2,  1},
    { 256,  256,  64,  64,  8, 4, 2,  1, 1,  1},
    { 256,  256,  48,  32,  6, 2, 3,  1, 1,  1},
};
// clang-format on

inline BwdConfig bwd_config(const BackwardParams& params, const BwdTile& t) {
  const AttnParams& p = params.fwd;
  BwdConfig c;
  c.dtype = i32(p.dtype);
  c.head_dim = i32(p.head_dim);
  c.head_dim_v = i32(p.head_dim_v);
  c.block_m = t.block_m;
  c.block_n = t.block_n;
  c.warps = t.warps;
  c.warps_n = t.warps_n;
  c.warps_dq = t.warps_dq;
  c.stages_q = t.stages_q;
  c.stages_do = t.stages_do;
  c.blocks = t.blocks;
  c.softcap = p.softcap != 0.f;
  c.alibi = p.alibi_slopes != nullptr;
  c.dropout = p.dropout_p > 0.f;
  c.deterministic = params.deterministic;
  return c;
}

// The first tile that takes the head dims and fits the device; null where none does.
inline const BwdTile* find_bwd_tile(const BackwardParams& params, const DeviceInfo& device) {
  const i64 head_dim = params.fwd.head_dim, head_dim_v = params.fwd.head_dim_v;
  for (const BwdTile& t : kBwdTiles) {
    if (round_up_16(int(head_dim)) > t.max_dim || round_up_16(int(head_dim_v)) > t.max_dim_v) continue;
    const BwdConfig c = bwd_config(params, t);
    if (valid(c) && smem_bytes(c) <= device.smem_per_block) return &t;
  }
  return nullptr;
}

}  // namespace strobe::host
