// NVRTC, the CUDA C++ compiler as a library: found where pip, conda or a toolkit put it, opened on first use.
#pragma once

#include <cstddef>
#include <string>

namespace strobe::host {

using nvrtcResult = int;
using nvrtcProgram = struct _nvrtcProgram*;

struct Nvrtc {
  const char* (*nvrtcGetErrorString)(nvrtcResult result);
  nvrtcResult (*nvrtcVersion)(int* major, int* minor);
  nvrtcResult (*nvrtcGetNumSupportedArchs)(int* count);
  nvrtcResult (*nvrtcGetSupportedArchs)(int* archs);
  nvrtcResult (*nvrtcCreateProgram)(nvrtcProgram* program, const char* source, const char* name, int num_headers,
                                    const char* const* headers, const char* const* include_names);
  nvrtcResult (*nvrtcDestroyProgram)(nvrtcProgram* program);
  nvrtcResult (*nvrtcAddNameExpression)(nvrtcProgram program, const char* expression);
  nvrtcResult (*nvrtcCompileProgram)(nvrtcProgram program, int num_options, const char* const* options);
  nvrtcResult (*nvrtcGetProgramLogSize)(nvrtcProgram program, size_t* size);
  nvrtcResult (*nvrtcGetProgramLog)(nvrtcProgram program, char* log);
  nvrtcResult (*nvrtcGetLoweredName)(nvrtcProgram program, const char* expression, const char** name);
  nvrtcResult (*nvrtcGetCUBINSize)(nvrtcProgram program, size_t* size);
  nvrtcResult (*nvrtcGetCUBIN)(nvrtcProgram program, char* cubin);

  int version;       // 13000 is CUDA 13.0
  std::string path;  // of the library
};

// The newest NVRTC of at most the driver's major version (any, where there is no driver). Throws Error that says what
// to install. STROBE_NVRTC=<file or folder> is looked at before everything else.
const Nvrtc& nvrtc();

}  // namespace strobe::host
