// Random calls through the C ABI against the definition: every feature together, valid and hostile. A problem is its
// seed.   fuzz [--problems N] [--first SEED] [--seed SEED] [--threads N]
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <thread>

#include "fuzz_oracle.h"
#include "fuzz_problem.h"

// A sanitizer that finds something aborts, so that the handler below can name the problem.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace fuzz {
namespace {

thread_local uint64_t running = 0;  // seed of the problem that this thread runs

void die(int signal) {
  char text[] = "\nFAILED in fuzz --seed                     \n";
  char* end = text + sizeof text - 3;
  for (uint64_t seed = running; seed; seed /= 10) *end-- = static_cast<char>('0' + seed % 10);
  if (write(2, text, sizeof text - 1) < 0) _exit(2);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void require(bool held, const std::string& what) {
  if (!held) throw Failure(what);
}

struct Counts {
  std::atomic<int64_t> valid{0}, accepted{0}, refused{0}, wild{0}, reruns{0}, threaded{0};
};

// Executors: one thread, and a thread per worker.
int32_t one(void*) { return 1; }
int32_t three(void*) { return 3; }
void run_all(void*, int32_t n, strobe_task task, void* state) {
  for (int32_t w = n; w-- > 0;) task(state, w);
}
void run_threads(void*, int32_t n, strobe_task task, void* state) {
  std::vector<std::thread> threads;
  for (int32_t w = 0; w < n; ++w) threads.emplace_back([=] { task(state, w); });
  for (std::thread& thread : threads) thread.join();
}
const strobe_executor kAlone = {nullptr, one, run_all}, kThreads = {nullptr, three, run_threads};
const double kShared = 1 << 19;  // multiply-adds from which the engine uses more than one thread

int32_t call(Problem& p, bool gradients) {
  const auto guard = [&](bool on) {
    for (Tensor& t : p.tensors) t.guard(on);
  };
  guard(true);
  int32_t status;
  if (gradients) {
    p.backward.fwd = p.args;
    status = strobe_backward(&p.backward);
  } else if (p.kind == Kind::kKVCache) {
    p.kvcache.fwd = p.args;
    status = strobe_kvcache(&p.kvcache);
  } else {
    status = strobe_forward(&p.args);
  }
  guard(false);
  return status;
}

void must_run(Problem& p, bool gradients) {
  const int32_t status = call(p, gradients);
  require(status == STROBE_OK, std::string("refused: ") + strobe_last_error());
}

void compare(const Tensor& t, const Wanted& wanted, const std::vector<bool>* only = nullptr) {
  size_t bad = 0;
  std::string first;
  for_each_element(t.view, [&](i64 n, i64 at) {
    if (only && !(*only)[static_cast<size_t>(n)]) return;
    const double given = load(t.view.dtype, static_cast<const char*>(t.view.data) + at * size_of(t.view.dtype));
    const double value = wanted.value[static_cast<size_t>(n)], error = wanted.error[static_cast<size_t>(n)];
    if (given == value || std::fabs(given - value) <= error || (std::isnan(value) && std::isnan(given))) return;
    if (bad++) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s: element %lld is %.9g, wanted %.9g with error up to %.3g", t.name.c_str(),
                  static_cast<long long>(n), given, value, error);
    first = text;
  });
  require(bad == 0, first + " (" + std::to_string(bad) + " such elements)");
}

// Rows of a cache, [page or entry, row, heads, dim], that appending may change.
std::vector<bool> appended_elements(const Tensor& cache, const std::vector<Sequence>& sequences) {
  std::vector<bool> mark = cache.elements();
  std::fill(mark.begin(), mark.end(), false);
  const strobe_tensor& t = cache.view;
  for (const Sequence& s : sequences)
    for (i64 row : s.new_k_rows)
      for (i64 h = 0; h < t.shape[2]; ++h)
        for (i64 c = 0; c < t.shape[3]; ++c) {
          const i64 index[] = {row / t.shape[1], row % t.shape[1], h, c};
          i64 at = 0;
          for (int i = 0; i < 4; ++i)
            if (t.shape[i] > 1) at += index[i] * t.stride[i];
          mark[static_cast<size_t>(at)] = true;
        }
  return mark;
}

// The caches' new rows hold what was appended; of keys that met in one row, the last.
void compare_appended(Problem& p) {
  const std::vector<Sequence> sequences = sequences_of(p.args, p.seqlen_new());
  const Wanted k = appended_k(p.kvcache);
  Wanted v(0);
  v.value = read(*p.kvcache.v_new);
  v.error.assign(v.value.size(), 0);
  for (const strobe_tensor* view : {p.args.k, p.args.v}) {
    const Wanted& fresh = view == p.args.k ? k : v;
    const std::vector<double> now = read(*view);
    Wanted cache(now.size());
    std::vector<bool> appended(now.size());
    const i64 width = view->shape[2] * view->shape[3];
    i64 from = 0;
    for (const Sequence& s : sequences)
      for (i64 row : s.new_k_rows) {
        std::copy_n(fresh.value.begin() + from * width, width, cache.value.begin() + row * width);
        std::copy_n(fresh.error.begin() + from * width, width, cache.error.begin() + row * width);
        std::fill_n(appended.begin() + row * width, width, true);
        ++from;
      }
    compare(*p.find(view), cache, &appended);
  }
}

void check_memory(Problem& p, bool gradients, bool written) {
  const std::vector<Tensor*> outputs = p.outputs();
  std::vector<Sequence> sequences;
  if (written && p.appends()) sequences = sequences_of(p.args, p.seqlen_new());
  for (Tensor& t : p.tensors) {
    bool is_output = std::count(outputs.begin(), outputs.end(), &t);
    if (p.kind == Kind::kBackward) is_output &= gradients == (t.name[0] == 'd');
    const bool grows = p.appends() && (&t.view == p.args.k || &t.view == p.args.v);
    std::vector<bool> may_change;
    if (written && is_output) may_change = t.elements();
    if (written && grows) may_change = appended_elements(t, sequences);
    require(t.kept(may_change),
            t.name + (may_change.empty() ? " was written" : " was written outside of its elements"));
  }
}

void check_results(Problem& p, bool gradients) {
  if (gradients) {
    const BackwardWanted wanted = backward(p.backward);
    compare(*p.find(p.backward.dq), wanted.dq);
    compare(*p.find(p.backward.dk), wanted.dk);
    compare(*p.find(p.backward.dv), wanted.dv);
    if (p.backward.ds_aux) compare(*p.find(p.backward.ds_aux), wanted.ds_aux);
    return;
  }
  if (p.appends()) compare_appended(p);
  const ForwardWanted wanted = p.kind == Kind::kKVCache ? kvcache(p.kvcache) : forward(p.args);
  compare(*p.find(p.args.out), wanted.out);
  if (p.args.lse) compare(*p.find(p.args.lse), wanted.lse);
}

// The same call again, by other threads: the same bits.
void check_bits(Problem& p, bool gradients, const strobe_executor* executor) {
  std::vector<std::vector<char>> first;
  for (Tensor& t : p.tensors) {
    first.push_back(t.bytes());
    t.restore();
  }
  p.args.executor = executor;
  must_run(p, gradients);
  size_t n = 0;
  for (Tensor& t : p.tensors) require(t.bytes() == first[n++], t.name + ": bits depend on the run or on the threads");
}

void check_refusal(Problem& p, int32_t status, bool gradients) {
  const std::string text = strobe_last_error();
  require(status == STROBE_INVALID_VALUE || status == STROBE_INVALID_TYPE,
          "status " + std::to_string(status) + ": " + text);
  require(text.rfind("strobe_", 0) == 0 && text.find("allowed is") != std::string::npos, "text: " + text);
  check_memory(p, gradients, false);
}

void run_valid(uint64_t seed, Counts& counts) {
  Problem p(seed, true);
  Random r(seed ^ 0xABCD);
  const bool shared = p.cost() >= kShared;
  const strobe_executor* pool = nullptr;
  for (const bool gradients : {false, true}) {
    if (gradients && p.kind != Kind::kBackward) break;
    p.args.executor = shared ? pool : r.one_of<const strobe_executor*>({nullptr, &kAlone, &kThreads});
    must_run(p, gradients);
    check_memory(p, gradients, true);
    check_results(p, gradients);
    if (shared || r.chance(0.05)) {
      check_bits(p, gradients, r.chance(0.5) ? &kAlone : &kThreads);
      ++(shared ? counts.threaded : counts.reruns);
    }
    for (Tensor& t : p.tensors) t.remember();  // backward reads what forward wrote
  }
  ++counts.valid;
}

void run_hostile(uint64_t seed, Counts& counts) {
  Problem p(seed, false);
  Random r(seed ^ 0x1234);
  const bool gradients = p.kind == Kind::kBackward;
  p.args.executor = &kAlone;
  if (gradients) {
    must_run(p, false);
    for (Tensor& t : p.tensors) t.remember();
  }
  std::string what;
  // Any bits in the floats: NaN, infinities, the largest numbers. Memory is then all that can be checked.
  const bool wild = r.chance(0.15);
  bool must_refuse = false;
  if (wild) {
    for (const Argument& a : p.arguments)
      if (a.tensor->view.dtype != STROBE_INT32)
        for_each_element(a.tensor->view, [&](i64, i64 at) {
          const uint64_t bits = r.next();
          std::memcpy(a.tensor->at(at), &bits, static_cast<size_t>(size_of(a.tensor->view.dtype)));
        });
    what = " any bits";
  }
  if (!wild || r.chance(0.3)) must_refuse = spoil(p, r, what);
  for (Tensor& t : p.tensors) t.remember();
  try {
    const int32_t status = call(p, gradients);
    if (status != STROBE_OK) {
      ++counts.refused;
      return check_refusal(p, status, gradients);
    }
    require(!must_refuse, "accepted");
    check_memory(p, gradients, true);
    ++(wild || gradients ? counts.wild : counts.accepted);
    if (!wild && !gradients) check_results(p, gradients);
  } catch (const std::exception& error) {
    throw Failure("spoiled:" + what + " " + error.what());
  }
}

bool run(uint64_t seed, Counts& counts, bool verbose) {
  running = seed;
  const bool hostile = seed % 4 == 3;
  if (verbose) std::printf("%s\n", Problem(seed, !hostile).text().c_str());
  try {
    hostile ? run_hostile(seed, counts) : run_valid(seed, counts);
    return true;
  } catch (const std::exception& error) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    std::printf("FAILED seed %llu: %s\n%s\n", static_cast<unsigned long long>(seed), error.what(),
                verbose ? "" : Problem(seed, !hostile).text().c_str());
    return false;
  }
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  using namespace fuzz;
  uint64_t first = 1, problems = 10000, threads = std::max(1u, std::thread::hardware_concurrency());
  bool verbose = false;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    const uint64_t value = std::strtoull(argv[i + 1], nullptr, 10);
    if (option == "--problems") problems = value;
    if (option == "--first") first = value;
    if (option == "--threads") threads = std::max<uint64_t>(1, value);
    if (option == "--seed") first = value, problems = 1, verbose = true;
  }
  std::signal(SIGABRT, die);
  std::signal(SIGFPE, die);
#if !defined(__SANITIZE_ADDRESS__)
  std::signal(SIGSEGV, die);
#endif
  const auto start = std::chrono::steady_clock::now();
  Counts counts;
  std::atomic<uint64_t> next{0}, failed{0};
  std::vector<std::thread> workers;
  for (uint64_t w = 0; w < std::min(threads, problems); ++w)
    workers.emplace_back([&] {
      for (uint64_t n; (n = next++) < problems && failed < 20;)
        if (!run(first + n, counts, verbose)) ++failed;
    });
  for (std::thread& worker : workers) worker.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf(
      "%s: %llu problems from seed %llu, %llu failed (%lld valid; hostile: %lld refused, %lld right, %lld in bounds; "
      "bits "
      "compared: %lld reruns, %lld on threads), %.0f s\n",
      strobe_cpu_isa(), static_cast<unsigned long long>(problems), static_cast<unsigned long long>(first),
      static_cast<unsigned long long>(failed), static_cast<long long>(counts.valid),
      static_cast<long long>(counts.refused), static_cast<long long>(counts.accepted),
      static_cast<long long>(counts.wild), static_cast<long long>(counts.reruns),
      static_cast<long long>(counts.threaded), seconds);
  return failed ? 1 : 0;
}
