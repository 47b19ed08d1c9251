#include "host/jit.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <memory>
#include <vector>

#include "host/nvrtc.h"
#include "host/problem.h"
#include "host/sources.h"

namespace strobe::host {
namespace {

namespace fs = std::filesystem;

// Functions of src/core are written once for host and device: without marks they are device functions here.
constexpr const char* kOptions[] = {"--std=c++20", "--device-as-default-execution-space", "--ptxas-options=-v"};

// Writes everything that the compiler saw, so that a failure can be looked at. Returns "" where nothing can be written.
std::string keep_sources(const std::string& source, const std::string& options, const std::string& log) {
  static std::atomic<int> kept{0};
  std::error_code error;
  const fs::path folder = fs::temp_directory_path(error) /
                          ("strobe-failed-" + std::to_string(getpid()) + "-" + std::to_string(kept.fetch_add(1)));
  if (error) return "";
  const auto write = [&](const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path(), error);
    std::ofstream(path, std::ios::binary) << text;
  };
  for (int i = 0; i < kEmbeddedSourceCount; ++i) write(folder / kEmbeddedSources[i].name, kEmbeddedSources[i].text);
  write(folder / "kernel.cu", source);
  write(folder / "options.txt", options);
  write(folder / "log.txt", log);
  return fs::exists(folder / "log.txt", error) ? folder.string() : "";
}

// The number before `word` in ptxas's report, such as "Used 128 registers" or "16 bytes spill stores". Its remarks also
// speak of registers, without a number.
int number_before(const std::string& log, const char* word) {
  for (size_t at = log.find(word); at != std::string::npos; at = log.find(word, at + 1)) {
    size_t begin = at;
    while (begin > 0 && log[begin - 1] >= '0' && log[begin - 1] <= '9') --begin;
    if (begin < at) return std::atoi(log.substr(begin, at - begin).c_str());
  }
  return 0;
}

// Of this thread, in which NVRTC does all its work: what else the machine does counts little.
double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

const char* digest_of(const char* header) {
  for (int i = 0; i < kEmbeddedSourceCount; ++i) {
    if (std::strcmp(kEmbeddedSources[i].name, header) == 0) return kEmbeddedSources[i].digest;
  }
  throw Error(STROBE_INTERNAL, std::string("no source is embedded as ") + header);
}

void check_arch(const Nvrtc& n, int arch) {
  int count = 0;
  if (n.nvrtcGetNumSupportedArchs(&count) != 0) return;
  std::vector<int> archs(static_cast<size_t>(count));
  if (n.nvrtcGetSupportedArchs(archs.data()) != 0) return;
  for (int known : archs) {
    if (known == arch) return;
  }
  throw Error(STROBE_UNSUPPORTED, "NVRTC " + std::to_string(n.version / 1000) + "." +
                                      std::to_string(n.version % 1000 / 10) + " (" + n.path + ") does not know sm_" +
                                      std::to_string(arch) + ": install a newer nvidia-cuda-nvrtc");
}

struct Program {
  const Nvrtc& n;
  nvrtcProgram handle = nullptr;
  ~Program() {
    if (handle) n.nvrtcDestroyProgram(&handle);
  }
};

std::string log_of(const Program& program) {
  size_t size = 0;
  if (program.n.nvrtcGetProgramLogSize(program.handle, &size) != 0 || size == 0) return "";
  std::string log(size, '\0');
  program.n.nvrtcGetProgramLog(program.handle, log.data());
  log.resize(std::strlen(log.c_str()));
  return log;
}

}  // namespace

std::string describe(const KernelRef& kernel) {
  struct State {
    const KernelRef& kernel;
    std::string text;
    int at = 0;
  } state{kernel,
          std::strrchr(kernel.source->name, ':') ? std::strrchr(kernel.source->name, ':') + 1 : kernel.source->name};
  state.text += "{";
  kernel.source->each_field(&state, [](void* context, const char* field, i32) {
    State& s = *static_cast<State*>(context);
    if (s.at) s.text += ", ";
    s.text += std::string(field) + "=" + std::to_string(s.kernel.values[s.at++]);
  });
  return state.text + "}";
}

std::string name_expression(const KernelRef& kernel) {
  std::string text = std::string(kernel.source->name) + "<" + kernel.source->config + "{";
  for (int i = 0; i < kernel.count; ++i) {
    if (i) text += ',';
    text += std::to_string(kernel.values[i]);
  }
  return text + "}>";
}

std::string target_of(int arch) { return "sm_" + std::to_string(arch) + (arch == 90 ? "a" : ""); }

std::string identity(const KernelRef& kernel, int arch) {
  std::string text = describe(kernel) + " " + target_of(arch) + " sources " + digest_of(kernel.source->header) + " " +
                     name_expression(kernel);
  for (const char* option : kOptions) text += std::string(" ") + option;
  return text;
}

Cubin compile(const KernelRef& kernel, int arch, CompileReport* report) {
  const Nvrtc& n = nvrtc();
  const double start = processor_seconds();
  check_arch(n, arch);

  std::vector<const char*> texts, names;
  for (int i = 0; i < kEmbeddedSourceCount; ++i) {
    texts.push_back(kEmbeddedSources[i].text);
    names.push_back(kEmbeddedSources[i].name);
  }
  const std::string source = std::string("#include \"") + kernel.source->header + "\"\n";
  const std::string expression = name_expression(kernel);
  const std::string architecture = "--gpu-architecture=" + target_of(arch);
  std::vector<const char*> options(std::begin(kOptions), std::end(kOptions));
  options.push_back(architecture.c_str());

  Program program{n};
  const auto check = [&](nvrtcResult result) {
    if (result == 0) return;
    std::string all;
    for (const char* option : options) all += std::string(option) + "\n";
    const std::string log = program.handle ? log_of(program) : "";
    const std::string folder = keep_sources(source + "// " + expression + "\n", all, log);
    throw Error(STROBE_INTERNAL, "cannot compile " + describe(kernel) + " for " + target_of(arch) + ": " +
                                     n.nvrtcGetErrorString(result) + "\n" + log +
                                     (folder.empty() ? "" : "\nsources kept in " + folder));
  };
  check(n.nvrtcCreateProgram(&program.handle, source.c_str(), "kernel.cu", kEmbeddedSourceCount, texts.data(),
                             names.data()));
  check(n.nvrtcAddNameExpression(program.handle, expression.c_str()));
  check(n.nvrtcCompileProgram(program.handle, static_cast<int>(options.size()), options.data()));

  Cubin cubin;
  const char* lowered = nullptr;
  check(n.nvrtcGetLoweredName(program.handle, expression.c_str(), &lowered));
  cubin.name = lowered;
  size_t size = 0;
  check(n.nvrtcGetCUBINSize(program.handle, &size));
  cubin.image.resize(size);
  check(n.nvrtcGetCUBIN(program.handle, cubin.image.data()));
  cubin.nvrtc_version = n.version;
  if (report) {
    report->log = log_of(program);
    report->registers = number_before(report->log, " registers");
    report->stack_bytes = number_before(report->log, " bytes stack frame");
    report->spill_stores = number_before(report->log, " bytes spill stores");
    report->spill_loads = number_before(report->log, " bytes spill loads");
    report->seconds = processor_seconds() - start;
  }
  return cubin;
}

}  // namespace strobe::host
