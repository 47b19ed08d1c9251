#include "host/cache.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace strobe::host {
namespace {

namespace fs = std::filesystem;

// Begins every entry; another layout gets another number.
constexpr char kMagic[8] = {'S', 'T', 'R', 'O', 'B', 'E', '0', '1'};

struct Header {
  char magic[8];
  uint64_t checksum;  // of the whole file with 0 here
  uint32_t nvrtc_version;
  uint32_t identity_bytes, name_bytes, image_bytes;
};

// FNV-1a, 64 bits. Entries hold their whole identity, so that a collision costs a compilation, never a wrong kernel.
uint64_t hash(const std::string& bytes, uint64_t h = UINT64_C(0xcbf29ce484222325)) {
  for (const char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * UINT64_C(0x100000001b3);
  return h;
}

uint64_t checksum_of(Header header, const std::string& body) {
  header.checksum = 0;
  return hash(body, hash(std::string(reinterpret_cast<const char*>(&header), sizeof header)));
}

}  // namespace

std::string cache_folder() {
  if (const char* chosen = std::getenv("STROBE_CACHE_DIR"); chosen && *chosen) return chosen;
  if (const char* base = std::getenv("XDG_CACHE_HOME"); base && *base) return std::string(base) + "/strobe";
  if (const char* home = std::getenv("HOME"); home && *home) return std::string(home) + "/.cache/strobe";
  return "";
}

std::string cache_path(const std::string& folder, const std::string& identity) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash(identity)));
  return folder + "/" + identity.substr(0, identity.find('{')) + "-" + digits + ".cubin";
}

bool read_cache(const std::string& path, const std::string& identity, int newest, Cubin& cubin) noexcept try {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  Header header;
  if (bytes.size() < sizeof header) return false;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return false;
  const std::string body = bytes.substr(sizeof header);
  if (body.size() != uint64_t{header.identity_bytes} + header.name_bytes + header.image_bytes) return false;
  if (checksum_of(header, body) != header.checksum) return false;
  if (body.compare(0, header.identity_bytes, identity) != 0) return false;
  if (static_cast<int>(header.nvrtc_version) > newest) return false;
  cubin.name = body.substr(header.identity_bytes, header.name_bytes);
  cubin.image = body.substr(header.identity_bytes + header.name_bytes);
  cubin.nvrtc_version = static_cast<int>(header.nvrtc_version);
  return true;
} catch (...) {
  return false;
}

bool write_cache(const std::string& path, const std::string& identity, const Cubin& cubin) noexcept try {
  static std::atomic<unsigned> written{0};
  std::error_code error;
  fs::create_directories(fs::path(path).parent_path(), error);
  const std::string body = identity + cubin.name + cubin.image;
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.nvrtc_version = static_cast<uint32_t>(cubin.nvrtc_version);
  header.identity_bytes = static_cast<uint32_t>(identity.size());
  header.name_bytes = static_cast<uint32_t>(cubin.name.size());
  header.image_bytes = static_cast<uint32_t>(cubin.image.size());
  header.checksum = checksum_of(header, body);

  // The process and a counter make the name its own, also where several hosts share the folder.
  char host[64] = {};
  gethostname(host, sizeof host - 1);
  const std::string temporary = path + "." + host + "." + std::to_string(getpid()) + "." + std::to_string(written++);
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(&header), sizeof header);
    file.write(body.data(), static_cast<std::streamsize>(body.size()));
    file.close();
    if (!file) {
      fs::remove(temporary, error);
      return false;
    }
  }
  fs::rename(temporary, path, error);
  if (!error) return true;
  fs::remove(temporary, error);
  return false;
} catch (...) {
  return false;
}

}  // namespace strobe::host
