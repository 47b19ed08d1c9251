#include "host/nvrtc.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "host/driver.h"
#include "host/problem.h"

namespace strobe::host {
namespace {

namespace fs = std::filesystem;

// C++20 came with CUDA 12.0.
constexpr int kOldestNvrtc = 12000;
constexpr const char* kInstall =
    "install it with `pip install nvidia-cuda-nvrtc` (CUDA 13) or `pip install nvidia-cuda-nvrtc-cu12`, or set "
    "STROBE_NVRTC to the file libnvrtc.so.13 or .12";

void add_folder(std::vector<fs::path>& folders, const fs::path& folder) {
  std::error_code ignored;
  if (fs::is_directory(folder, ignored) && std::find(folders.begin(), folders.end(), folder) == folders.end()) {
    folders.push_back(folder);
  }
}

// site-packages/nvidia/<package>/lib, where NVIDIA's wheels put their libraries.
void add_wheels(std::vector<fs::path>& folders, const fs::path& site_packages) {
  std::error_code ignored;
  for (const fs::directory_entry& package : fs::directory_iterator(site_packages / "nvidia", ignored)) {
    add_folder(folders, package.path() / "lib");
  }
}

// Libraries that this process has loaded: beside CUDA's are the rest of CUDA, beside torch's is site-packages.
int visit_loaded(dl_phdr_info* info, size_t, void* context) {
  auto& folders = *static_cast<std::vector<fs::path>*>(context);
  const fs::path path = info->dlpi_name ? info->dlpi_name : "";
  const std::string name = path.filename().string();
  if (name.rfind("libcudart", 0) == 0 || name.rfind("libnvrtc", 0) == 0 || name.rfind("libcublas", 0) == 0) {
    add_folder(folders, path.parent_path());
  } else if (name.rfind("libtorch_c", 0) == 0) {
    add_folder(folders, path.parent_path());
    add_wheels(folders, path.parent_path().parent_path().parent_path());
  }
  return 0;
}

std::vector<fs::path> folders_to_search() {
  std::vector<fs::path> folders;
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&visit_loaded), &self) && self.dli_fname) {
    add_wheels(folders, fs::path(self.dli_fname).parent_path().parent_path());  // beside site-packages/strobe
  }
  dl_iterate_phdr(visit_loaded, &folders);
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"}) {
    if (const char* root = std::getenv(variable); root && *root) {
      add_folder(folders, fs::path(root) / "lib64");
      add_folder(folders, fs::path(root) / "lib");
    }
  }
  add_folder(folders, "/usr/local/cuda/lib64");
  return folders;
}

bool is_nvrtc(const fs::path& path) {
  const std::string name = path.filename().string();
  return name == "libnvrtc.so" || name.rfind("libnvrtc.so.", 0) == 0;
}

void add_libraries(std::vector<std::string>& libraries, const fs::path& folder) {
  std::error_code ignored;
  for (const fs::directory_entry& file : fs::directory_iterator(folder, ignored)) {
    if (is_nvrtc(file.path())) libraries.push_back(file.path().string());
  }
}

// libnvrtc opens its builtins by name alone, which finds nothing in a folder that the loader does not search.
void preload_builtins(const fs::path& library) {
  std::error_code ignored;
  for (const fs::directory_entry& file : fs::directory_iterator(library.parent_path(), ignored)) {
    if (file.path().filename().string().rfind("libnvrtc-builtins.so.", 0) == 0) {
      dlopen(file.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
  }
}

// False where the file is no library, or not all of NVRTC. `n.version` may still be too old.
bool open_library(const std::string& path, Nvrtc& n) {
  if (path.find('/') != std::string::npos) preload_builtins(path);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return false;
  bool complete = true;
  const auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    complete &= function != nullptr;
  };
#define STROBE_FIND(name) find(#name, n.name)
  STROBE_FIND(nvrtcGetErrorString);
  STROBE_FIND(nvrtcVersion);
  STROBE_FIND(nvrtcGetNumSupportedArchs);
  STROBE_FIND(nvrtcGetSupportedArchs);
  STROBE_FIND(nvrtcCreateProgram);
  STROBE_FIND(nvrtcDestroyProgram);
  STROBE_FIND(nvrtcAddNameExpression);
  STROBE_FIND(nvrtcCompileProgram);
  STROBE_FIND(nvrtcGetProgramLogSize);
  STROBE_FIND(nvrtcGetProgramLog);
  STROBE_FIND(nvrtcGetLoweredName);
  STROBE_FIND(nvrtcGetCUBINSize);
  STROBE_FIND(nvrtcGetCUBIN);
#undef STROBE_FIND
  int major = 0, minor = 0;
  if (!complete || n.nvrtcVersion(&major, &minor) != 0) return false;
  n.version = 1000 * major + 10 * minor;
  n.path = path;
  return true;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Nvrtc open_nvrtc() {
  std::vector<std::string> libraries;
  const char* chosen = std::getenv("STROBE_NVRTC");
  if (chosen && *chosen) {
    if (std::error_code ignored; fs::is_directory(chosen, ignored)) {
      add_libraries(libraries, chosen);
    } else {
      libraries.push_back(chosen);
    }
  } else {
    for (const fs::path& folder : folders_to_search()) add_libraries(libraries, folder);
    libraries.insert(libraries.end(), {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"});
  }
  // A driver loads what a compiler of its own major version made, or of an older one.
  const int driver = driver_version();
  const int newest = driver ? driver / 1000 * 1000 + 999 : kOldestNvrtc * 1000;
  Nvrtc best{}, candidate{};
  std::string refused;
  for (const std::string& library : libraries) {
    if (!open_library(library, candidate)) continue;
    if (candidate.version < kOldestNvrtc) {
      refused = library + " is version " + version_text(candidate.version) + ", Strobe needs 12.0 or later";
    } else if (candidate.version > newest) {
      refused = library + " is version " + version_text(candidate.version) + " but the driver serves CUDA " +
                version_text(driver);
    } else if (candidate.version > best.version) {
      best = candidate;
    }
  }
  if (best.version) return best;
  if (chosen && *chosen && refused.empty())
    refused = std::string("STROBE_NVRTC is ") + chosen + ", which cannot be opened";
  throw Error(STROBE_UNSUPPORTED, "CUDA tensors need NVRTC, the CUDA run-time compiler, " +
                                      (refused.empty() ? "and none is found" : "but " + refused) + ": " + kInstall);
}

}  // namespace

const Nvrtc& nvrtc() {
  static const Nvrtc opened = open_nvrtc();
  return opened;
}

}  // namespace strobe::host
