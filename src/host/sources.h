// The kernels' sources, embedded in the library by scripts/embed_sources.py so that NVRTC needs no files.
#pragma once

namespace strobe::host {

struct EmbeddedSource {
  const char* name;  // under src/: "core/mask.h"; every #include between them is written like this
  const char* text;
  const char* digest;  // hexadecimal, of this text and of all that it includes
};

extern const EmbeddedSource kEmbeddedSources[];
extern const int kEmbeddedSourceCount;

}  // namespace strobe::host
