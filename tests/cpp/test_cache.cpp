// The kernel cache on disk: what is written is read back, anything else is refused, and processes do not disturb
// each other. Needs neither a GPU nor a compiler.
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "host/cache.h"
#include "host/problem.h"
#include "host/registry.h"

namespace {

namespace fs = std::filesystem;
using namespace strobe::host;
using strobe::i32;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

constexpr int kAnyCuda13 = 13999;

struct ToyConfig {
  i32 size = 3;
  i32 kind = 4;
};
template <class F>
constexpr void fields(const ToyConfig& c, F f) {
  f("size", c.size);
  f("kind", c.kind);
}
constexpr KernelTemplate kToy = kernel_template<ToyConfig>("core/base.h", "strobe::toy", "strobe::ToyConfig");

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

Cubin example(char fill, size_t bytes) { return {"_Z3toy", std::string(bytes, fill), 13000}; }

bool readable(const std::string& path, const std::string& identity, int newest = kAnyCuda13) {
  Cubin cubin;
  return read_cache(path, identity, newest, cubin);
}

void test_words() {
  const KernelRef kernel = kernel_ref(kToy, ToyConfig{7, -1});
  expect(describe(kernel) == "toy{size=7, kind=-1}", "describe");
  expect(name_expression(kernel) == "strobe::toy<strobe::ToyConfig{7,-1}>", "name_expression");
  expect(identity(kernel, 90) != identity(kernel, 89), "the identity tells architectures apart");
  expect(identity(kernel, 90) != identity(kernel_ref(kToy, ToyConfig{7, 0}), 90), "the identity tells Configs apart");
  expect(identity(kernel, 90).find(" sm_90a ") != std::string::npos, "the identity holds the target");
}

void test_round_trip(const std::string& folder) {
  const std::string identity = "toy{size=1} sm_90a", path = cache_path(folder + "/made/on/demand", identity);
  Cubin written = example('x', 5000), read;
  written.image[17] = '\0';  // images are bytes, not text
  expect(!readable(path, identity), "nothing is read before it is written");
  expect(write_cache(path, identity, written), "write");
  expect(read_cache(path, identity, kAnyCuda13, read), "read");
  expect(read.name == written.name && read.image == written.image && read.nvrtc_version == 13000, "what was written");
  expect(readable(path, identity, 13000), "an entry of the newest version that is allowed");
  expect(!readable(path, identity, 12999), "an entry that the driver is too old for");
  expect(!readable(path, "toy{size=2} sm_90a"), "an entry of another identity in the same file");
  expect(cache_path(folder, identity) != cache_path(folder, "toy{size=2} sm_90a"), "files of two identities differ");
  expect(std::distance(fs::directory_iterator(folder + "/made/on/demand"), {}) == 1, "no temporary file is left");
}

void test_corrupt(const std::string& folder) {
  const std::string identity = "toy{size=1} sm_80", path = cache_path(folder, identity);
  expect(write_cache(path, identity, example('y', 300)), "write");
  const std::string whole = read_file(path);
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x20);
    write_file(path, bytes);
    expect(!readable(path, identity), "one wrong byte");
  }
  for (size_t size = 0; size < whole.size(); ++size) {
    write_file(path, whole.substr(0, size));
    expect(!readable(path, identity), "a file that was cut off");
  }
  write_file(path, whole + "z");
  expect(!readable(path, identity), "a file with more behind it");
  expect(write_cache(path, identity, example('y', 300)) && readable(path, identity), "a corrupt entry is rebuilt");
}

void test_unwritable(const std::string& folder) {
  const std::string file = folder + "/a-file";
  write_file(file, "");
  expect(!write_cache(cache_path(file, "toy{}"), "toy{}", example('z', 10)), "a folder that cannot be made");
}

// Writers of different images under one identity, and a reader: it sees whole entries only.
void test_processes(const std::string& folder) {
  const std::string identity = "toy{size=9} sm_86", path = cache_path(folder, identity);
  constexpr int kWriters = 4, kRounds = 50;
  constexpr size_t kBytes = 200000;
  expect(write_cache(path, identity, example('a', kBytes)), "write");
  pid_t writers[kWriters];
  for (int w = 0; w < kWriters; ++w) {
    writers[w] = fork();
    if (writers[w] != 0) continue;
    bool written = true;
    for (int i = 0; i < kRounds; ++i) {
      written &= write_cache(path, identity, example(static_cast<char>('a' + w), kBytes));
    }
    _exit(written ? 0 : 1);
  }
  int read = 0;
  for (int running = kWriters; running > 0;) {
    Cubin cubin;
    const bool whole = read_cache(path, identity, kAnyCuda13, cubin);
    expect(whole && cubin.image == std::string(kBytes, cubin.image[0]), "an entry while others write it");
    read += whole;
    int status = 0;
    if (waitpid(-1, &status, WNOHANG) > 0) {
      --running;
      expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a writer among others");
    }
  }
  expect(read > 0, "entries were read");
  expect(std::distance(fs::directory_iterator(folder), {}) == 1, "no temporary file is left");
}

void test_without_jit(const std::string& folder) {
  setenv("STROBE_CACHE_DIR", folder.c_str(), 1);
  setenv("STROBE_DISABLE_JIT", "1", 1);
  const KernelRef kernel = kernel_ref(kToy, ToyConfig{11, 12});
  try {
    cubin_of(kernel, 80, kAnyCuda13);
    expect(false, "a kernel that is nowhere");
  } catch (const strobe::Error& error) {
    const std::string text = error.what();
    expect(error.status == STROBE_UNSUPPORTED, "the status of a refusal");
    expect(text.find("STROBE_DISABLE_JIT is set and toy{size=11, kind=12} for sm_80 is not in " + folder) == 0,
           "the words of a refusal");
  }
  const std::string key = identity(kernel, 80);
  expect(write_cache(cache_path(folder, key), key, example('c', 100)), "write");
  expect(cubin_of(kernel, 80, kAnyCuda13).image == example('c', 100).image, "a kernel from the disk");
  fs::remove_all(folder);
  expect(cubin_of(kernel, 80, kAnyCuda13).image == example('c', 100).image, "a kernel from memory");
  unsetenv("STROBE_DISABLE_JIT");
}

}  // namespace

int main() {
  char base[] = "/tmp/strobe-test-cache-XXXXXX";
  if (!mkdtemp(base)) return 1;
  const auto folder = [&](const char* name) {
    fs::create_directories(fs::path(base) / name);
    return std::string(base) + "/" + name;
  };
  test_words();
  test_round_trip(folder("round"));
  test_corrupt(folder("corrupt"));
  test_unwritable(folder("unwritable"));
  test_processes(folder("processes"));
  test_without_jit(folder("jit"));
  fs::remove_all(base);
  if (failures == 0) std::printf("cache: all as it should be\n");
  return failures != 0;
}
