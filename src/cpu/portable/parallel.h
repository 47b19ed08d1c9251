// Work sharing: items are pulled in increasing order, so results depend on the items and never on the number of
// threads.
#pragma once

#include <atomic>

#include "core/base.h"
#include "strobe/strobe.h"

namespace strobe::cpu {

// Calls f(item) for every item in [0, items). `flops` decides whether waking other threads pays.
template <class F>
void parallel_items(const strobe_executor& executor, i64 items, double flops, F f) {
  struct State {
    std::atomic<i64> next{0};
    i64 items;
    F* f;
  } state{{0}, items, &f};
  // Safe also where the executor runs its workers one after another: the first then drains the counter.
  const strobe_task task = [](void* opaque, int32_t) {
    State& s = *static_cast<State*>(opaque);
    for (i64 item; (item = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) (*s.f)(item);
  };
  constexpr double kWorthSharing = 1e4;  // below that, waking another thread costs more
  const i64 threads = flops < kWorthSharing ? 1 : min<i64>(items, executor.num_threads(executor.context));
  if (threads <= 1)
    task(&state, 0);
  else
    executor.run(executor.context, int32_t(threads), task, &state);
}

}  // namespace strobe::cpu
