#include "host/executor.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace strobe {
namespace {

constexpr int kMaxThreads = 1024;

// One run(): workers and the caller draw task numbers until none is left.
struct Job {
  Job(int32_t count, strobe_task task, void* state) : count(count), task(task), state(state) {}

  const int32_t count;
  const strobe_task task;
  void* const state;
  std::atomic<int32_t> next{0};
  int active = 0;  // pool threads inside; guarded by Pool::mutex
  std::exception_ptr error;
  std::mutex error_mutex;

  void work() {
    for (;;) {
      const int32_t w = next.fetch_add(1, std::memory_order_relaxed);
      if (w >= count) return;
      try {
        task(state, w);
      } catch (...) {
        next.store(count, std::memory_order_relaxed);
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        break;  // the callers do what missing threads would have done
      }
    }
  }

  int threads() const { return threads_; }

  void run(int32_t n, strobe_task task, void* state) {
    Job job(n, task, state);
    // One job at a time has the pool's threads. Who comes meanwhile, a nested call among them, works alone.
    bool shared = false;
    if (n > 1 && threads_ > 1) {
      std::lock_guard lock(mutex_);
      if (!job_) {
        job_ = &job;
        ++round_;
        shared = true;
      }
    }
    if (shared) wake_.notify_all();
    job.work();
    if (shared) {
      std::unique_lock lock(mutex_);
      job_ = nullptr;
      idle_.wait(lock, [&] { return job.active == 0; });
    }
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  void serve() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ && round_ != seen; });
      Job* job = job_;
      seen = round_;
      ++job->active;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->active == 0) idle_.notify_all();
    }
  }

  const int threads_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  uint64_t round_ = 0;
};

int wanted_threads() {
  if (const char* text = std::getenv("STROBE_NUM_THREADS")) {
    const long n = std::strtol(text, nullptr, 10);
    if (n >= 1) return static_cast<int>(n < kMaxThreads ? n : kMaxThreads);
  }
#ifdef __linux__
  cpu_set_t cores;  // those this process may use, which in a container are fewer than the machine has
  if (pthread_getaffinity_np(pthread_self(), sizeof cores, &cores) == 0 && CPU_COUNT(&cores) > 0) {
    return CPU_COUNT(&cores);
  }
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

std::atomic<Pool*> the_pool{nullptr};

// The threads live as long as the process: the pool is never destroyed, so that exit waits for nobody.
Pool& pool() {
  if (Pool* made = the_pool.load(std::memory_order_acquire)) return *made;
  static std::mutex* making = new std::mutex;
  static const int registered = pthread_atfork([] { making->lock(); }, [] { making->unlock(); },
                                               [] {
                                                 // The parent's threads are not here: the next call makes new ones.
                                                 the_pool.store(nullptr, std::memory_order_release);
                                                 making->unlock();
                                               });
  (void)registered;
  std::lock_guard lock(*making);
  Pool* made = the_pool.load(std::memory_order_acquire);
  if (!made) {
    made = new Pool(wanted_threads());
    the_pool.store(made, std::memory_order_release);
  }
  return *made;
}

int32_t num_threads(void*) { return pool().threads(); }
void run(void*, int32_t n, strobe_task task, void* state) { pool().run(n, task, state); }

}  // namespace

const strobe_executor& default_executor() {
  static const strobe_executor executor{nullptr, num_threads, run};
  return executor;
}

}  // namespace strobe
