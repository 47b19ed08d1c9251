// Compiled kernels on disk, in one file each: $STROBE_CACHE_DIR or ~/.cache/strobe. Nothing here throws: a cache that
// cannot be read or written only costs time. Several processes may use one folder at once.
#pragma once

#include <string>

#include "host/jit.h"

namespace strobe::host {

// "" where there is no place for a cache.
std::string cache_folder();
// The entry's file in `folder`.
std::string cache_path(const std::string& folder, const std::string& identity);

// True if a whole entry of this identity is there, made by NVRTC of at most `newest` (13999: any of CUDA 13).
bool read_cache(const std::string& path, const std::string& identity, int newest, Cubin& cubin) noexcept;
// Written under another name, then renamed: readers see all of it or nothing. False if it cannot be written.
bool write_cache(const std::string& path, const std::string& identity, const Cubin& cubin) noexcept;

}  // namespace strobe::host
