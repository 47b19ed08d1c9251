// Dropout bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same on
// every engine. One call serves eight scores of a 16 x 16 block, those that one lane of an m16n8 matrix instruction
// holds:
//
//   counter = (j / 16, i / 16, (batch * num_heads + head) * 32 + lane, offset)    lane = (i % 8) * 4 + (j % 8) / 2
//   word    = (j / 8 % 2) * 2 + i / 8 % 2, its low half for even j, its high half for odd j
//
// i and j are the row and key within their sequence. A score is kept if its 16 bits are below keep_threshold(p).
#pragma once

#include "base.h"

namespace strobe {

struct Philox4 {
  u32 word[4];
};

STROBE_HD Philox4 philox4x32(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
  for (int round = 0; round < 10; ++round) {
    const u64 a = u64(0xD2511F53u) * c0, b = u64(0xCD9E8D57u) * c2;
    c0 = u32(b >> 32) ^ c1 ^ k0;
    c1 = u32(b);
    c2 = u32(a >> 32) ^ c3 ^ k1;
    c3 = u32(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

STROBE_HD u32 keep_threshold(float dropout_p) { return u32((1.f - dropout_p) * 65536.f + 0.5f); }

// `bh` is batch * num_heads + head.
struct Dropout {
  u64 seed, offset;
  u32 threshold;

  STROBE_HD Philox4 lane(i64 block_i, i64 block_j, i64 bh, i32 lane) const {
    return philox4x32(u32(block_j), u32(block_i), u32(bh * 32 + lane), u32(offset), u32(seed),
                      u32(seed >> 32) ^ u32(offset >> 32));
  }

  // For one score at a time; engines draw whole blocks.
  STROBE_HD bool keep(i64 i, i64 j, i64 bh) const {
    const Philox4 draw = lane(i / 16, j / 16, bh, i32((i % 8) * 4 + (j % 8) / 2));
    const u32 word = draw.word[(j / 8 % 2) * 2 + i / 8 % 2];
    return (j % 2 ? word >> 16 : word & 0xFFFFu) < threshold;
  }
};

}  // namespace strobe
