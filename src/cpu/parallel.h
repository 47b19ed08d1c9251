// Items of work over an executor's threads.
#pragma once

#include "core/base.h"
#include "strobe/strobe.h"

// Files that are built once per instruction set keep their copy in that set's namespace.
#if defined(STROBE_ISA)
namespace strobe::cpu::STROBE_ISA {
#else
namespace strobe::cpu {
#endif

// Below this many multiply-adds waking a thread costs more than it saves.
constexpr double kInlineCost = 1 << 19;

// f(item) for every item in [0, n_items), once each, begun in increasing order. `cost` is a rough count of
// multiply-adds over all items. Workers pull items, so it does not matter whether the executor runs them at once or one
// by one.
template <class F>
void parallel_items(const strobe_executor& executor, i64 n_items, double cost, F f) {
  if (n_items <= 0) return;
  const i64 threads =
      n_items == 1 || cost < kInlineCost ? 1 : min<i64>(executor.num_threads(executor.context), n_items);
  if (threads <= 1) {
    for (i64 item = 0; item < n_items; ++item) f(item);
    return;
  }
  struct State {
    F* f;
    i64 n_items;
    i64 next;
  } state = {&f, n_items, 0};
  executor.run(
      executor.context, i32(threads),
      [](void* context, i32) {
        State& s = *static_cast<State*>(context);
        for (;;) {
          const i64 item = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED);
          if (item >= s.n_items) return;
          (*s.f)(item);
        }
      },
      &state);
}

}  // namespace strobe::cpu
