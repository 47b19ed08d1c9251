// The compiler's part: a toy kernel among the embedded sources becomes machine code for each architecture, and a kernel
// that does not compile an error that says where to look. Needs NVRTC, and no GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "host/jit.h"
#include "host/nvrtc.h"
#include "host/problem.h"
#include "host/sources.h"

namespace strobe::host {

// In the place of the library's.
const EmbeddedSource kEmbeddedSources[] = {
    {"core/toy.h",
     "#pragma once\nnamespace strobe { struct ToyConfig { int size, broken; bool operator==(const ToyConfig&) const = "
     "default; };\nconstexpr int twice(int n) { return 2 * n; } }\n",
     "one"},
    {"cuda/toy.cuh", R"(#include "core/toy.h"
#include "core/toy.h"
namespace strobe {
template <ToyConfig C> __global__ void toy(int* out) {
  extern __shared__ __align__(16) int s[];
  s[threadIdx.x] = out[threadIdx.x] * twice(C.size);
  __syncthreads();
  static_assert(C.broken != 1, "broken on purpose");
  if constexpr (C.broken == 2) {
    int spilled[64];
    for (int i = 0; i < 64; ++i) spilled[i] = out[i];
    for (int i = 0; i < 64; ++i) out[i] = spilled[out[i + 64] & 63];
  }
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}
})",
     "two"},
};
const int kEmbeddedSourceCount = 2;

}  // namespace strobe::host

namespace {

namespace fs = std::filesystem;
using namespace strobe::host;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

struct ToyConfig {
  int size = 0, broken = 0;
};
template <class F>
constexpr void fields(const ToyConfig& c, F f) {
  f("size", c.size);
  f("broken", c.broken);
}
constexpr KernelTemplate kToy = kernel_template<ToyConfig>("cuda/toy.cuh", "strobe::toy", "strobe::ToyConfig");

void test_architectures() {
  for (int arch : {80, 86, 89, 90, 120}) {
    CompileReport report;
    const Cubin cubin = compile(kernel_ref(kToy, ToyConfig{5, 0}), arch, &report);
    expect(cubin.image.compare(0, 4, "\177ELF") == 0, "an ELF image");
    expect(cubin.image.find(cubin.name) != std::string::npos && cubin.name.find("toy") != std::string::npos,
           "the image holds the function's name");
    expect(cubin.nvrtc_version >= 12000, "the compiler's version");
    expect(report.registers > 0 && report.registers < 64, "registers in the report");
    expect(report.stack_bytes == 0 && report.spill_stores == 0 && report.spill_loads == 0, "no spills in the report");
  }
  CompileReport report;
  compile(kernel_ref(kToy, ToyConfig{5, 2}), 80, &report);
  expect(report.stack_bytes >= 256, "an array with run-time indices is on the stack");
}

std::string error_of(const ToyConfig& config, int arch) {
  try {
    compile(kernel_ref(kToy, config), arch);
  } catch (const strobe::Error& error) {
    return error.what();
  }
  return "";
}

void test_errors() {
  const std::string text = error_of({6, 1}, 80);
  expect(text.find("cannot compile toy{size=6, broken=1} for sm_80: ") == 0, "the error begins with the Config");
  expect(text.find("broken on purpose") != std::string::npos, "the error holds the log");
  const char* kept = "sources kept in ";
  const size_t at = text.find(kept);
  expect(at != std::string::npos, "the error names a folder");
  if (at != std::string::npos) {
    const fs::path folder = text.substr(at + std::strlen(kept));
    for (const char* file : {"core/toy.h", "cuda/toy.cuh", "kernel.cu", "options.txt", "log.txt"}) {
      expect(fs::exists(folder / file), file);
    }
    fs::remove_all(folder);
  }
  const std::string unknown = error_of({6, 0}, 81);
  expect(unknown.find("does not know sm_81: install a newer nvidia-cuda-nvrtc") != std::string::npos,
         "an architecture that the compiler does not know");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "missing") == 0) {
    setenv("STROBE_NVRTC", "/nowhere/libnvrtc.so.13", 1);
    const std::string text = error_of({6, 0}, 80);
    expect(text.find("STROBE_NVRTC is /nowhere/libnvrtc.so.13, which cannot be opened") != std::string::npos &&
               text.find("pip install nvidia-cuda-nvrtc") != std::string::npos,
           "the error says what to install");
    return failures != 0;
  }
  test_architectures();
  test_errors();
  if (failures == 0) std::printf("jit: all as it should be, with %s\n", nvrtc().path.c_str());
  return failures != 0;
}
