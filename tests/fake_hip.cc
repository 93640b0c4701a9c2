// A HIP runtime without a GPU: takes AITER's FP8 MLA prefill code object and interprets what its kernel does, on host
// memory. It follows the kernel's disassembly and knows nothing of the code that plans and merges, or tests of that code
// would be circular. Where the kernel would read or write what it should not, the launch fails with the reason.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace {

constexpr int kRows = 256, kKeys = 128, kWidth = 192, kValues = 128;
enum Fault {
  kNone, kNoObject, kNoSymbol, kArguments, kGeometry, kNullPointer, kUnaligned, kNanCode, kBadScale, kTwice,
  kBeyondPartials, kBadRecord, kFaults
};
const char* const kText[kFaults] = {
    "no error", "no code object for gfx950", "symbol not found", "wrong size of the kernel arguments",
    "wrong grid or block", "null pointer", "keys of a record start within a unit", "a NaN code was read",
    "the scale is not a positive number", "a result was written twice", "stored past the partial results",
    "a record out of range"};

struct Function {
  bool causal;
};

struct Facts {  // of the last launch
  unsigned char arguments[304];
  unsigned grid, block;
  int64_t launches, partial_rows;  // partial_rows: set by the test; 0 if unknown
} facts;

struct Kernel {
  const uint8_t *q, *k, *v;
  uint16_t* out;
  float *partial_out, *partial_lse;
  const int32_t *work_indptr, *work, *q_indptr, *k_indptr, *pages;
  float scale, v_scale;
  uint32_t tokens, heads, keys, used;
  bool causal;
  std::set<std::tuple<bool, int64_t, int>> written;
};

float Decode(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float value = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return code & 0x80 ? -value : value;
}

float RoundToE4m3(float x) {  // 0 <= x <= 1
  if (x == 0) return 0;
  const float step = std::ldexp(1.0f, std::max(std::ilogb(x), -6) - 3);
  return std::nearbyint(x / step) * step;
}

uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// A row of codes; zeros for a row that is not there.
bool ReadRow(const uint8_t* source, int64_t row, int64_t rows, int head, int heads, int width, float* to) {
  for (int d = 0; d < width; ++d) {
    const uint8_t code = row >= 0 && row < rows ? source[(row * heads + head) * width + d] : 0;
    if ((code & 0x7F) == 0x7F) return false;
    to[d] = Decode(code);
  }
  return true;
}

struct Row {  // the running softmax of a query row
  float q[kWidth], top = -std::numeric_limits<float>::max(), total = 0, sum[kValues] = {};
};

// One block of 128 keys; k is transposed.
void Step(const Kernel& kernel, const float (*k)[kKeys], const float (*v)[kValues], int count, Row& row) {
  float score[kKeys] = {};
  for (int d = 0; d < kWidth; ++d) {
    for (int j = 0; j < kKeys; ++j) score[j] += row.q[d] * k[d][j];
  }
  float top = row.top;
  for (int j = 0; j < count; ++j) top = std::max(top, score[j]);
  const float shrink = std::exp((row.top - top) * kernel.scale);
  row.top = top;
  row.total *= shrink;
  for (float& x : row.sum) x *= shrink;
  for (int j = 0; j < count; ++j) {
    const float p = std::exp((score[j] - top) * kernel.scale), stored = RoundToE4m3(p);
    row.total += p;
    for (int d = 0; d < kValues; ++d) row.sum[d] += stored * v[j][d];
  }
}

Fault Store(Kernel& kernel, const int32_t* record, int head, int r, const Row& row) {
  const bool whole = record[1] == -1;
  const int64_t place = (whole ? record[2] : record[1]) + int64_t{r};
  if (whole && place >= record[3]) return kNone;
  if (!whole && facts.partial_rows && place >= facts.partial_rows) return kBeyondPartials;
  if (!kernel.written.emplace(whole, place, head).second) return kTwice;
  const int64_t at = place * kernel.heads + head;
  const float factor = row.total == 0 ? 0 : kernel.v_scale / row.total;
  for (int d = 0; d < kValues; ++d) {
    if (whole) kernel.out[at * kValues + d] = ToBf16(row.sum[d] * factor);
    if (!whole) kernel.partial_out[at * kValues + d] = row.sum[d] * factor;
  }
  if (!whole) kernel.partial_lse[at] = std::log(row.total) + row.top * kernel.scale;
  return kNone;
}

// A record: batch, place of the partial tile or -1, rows from and to, keys from and to, unused, head.
Fault RunRecord(Kernel& kernel, const int32_t* record) {
  const int b = record[0], head = record[7] & 0xFFFF;
  const int first = kernel.k_indptr[b], low = record[4] - first, high = record[5] - first;
  const int keys = kernel.k_indptr[b + 1] - first, queries = kernel.q_indptr[b + 1] - kernel.q_indptr[b];
  if (head >= int(kernel.heads) || record[2] < 0 || record[3] > int(kernel.tokens) || low < 0) return kBadRecord;
  if (low % kKeys) return kUnaligned;
  std::vector<Row> rows(kRows);
  for (int r = 0; r < kRows; ++r) {
    const int64_t token = record[2] + r < record[3] ? record[2] + r : -1;
    if (!ReadRow(kernel.q, token, kernel.tokens, head, kernel.heads, kWidth, rows[r].q)) return kNanCode;
  }
  static float k[kWidth][kKeys], v[kKeys][kValues], one[kWidth];
  for (int block = low; block < high; block += kKeys) {
    for (int j = 0; j < kKeys; ++j) {  // also those behind the last one: the kernel reads and masks them
      const int64_t entry = int64_t{first} + block + j;
      const int64_t page = entry < kernel.used ? kernel.pages[entry] : 0;
      if (!ReadRow(kernel.k, page, kernel.keys, head, kernel.heads, kWidth, one)) return kNanCode;
      for (int d = 0; d < kWidth; ++d) k[d][j] = one[d];
      if (!ReadRow(kernel.v, page, kernel.keys, head, kernel.heads, kValues, v[j])) return kNanCode;
    }
    for (int r = 0; r < record[3] - record[2] && r < kRows; ++r) {
      const int last = keys - queries + (record[2] - kernel.q_indptr[b]) + 1 + r;
      const int limit = kernel.causal ? std::min(high, last) : high;
      if (limit > block) Step(kernel, k, v, std::min(limit - block, kKeys), rows[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (record[2] + r >= record[3]) rows[r].total = std::nanf("");  // nobody may read what lies there
    if (Fault fault = Store(kernel, record, head, r, rows[r])) return fault;
  }
  return kNone;
}

template <class T>
T At(int offset) {
  T value;
  std::memcpy(&value, facts.arguments + offset, sizeof value);
  return value;
}

Fault Run(bool causal) {
  for (int offset = 0; offset < 224; offset += 16) {
    if (!At<const void*>(offset)) return kNullPointer;
  }
  Kernel kernel{At<const uint8_t*>(0), At<const uint8_t*>(16), At<const uint8_t*>(32), At<uint16_t*>(48),
                At<float*>(64), At<float*>(80), At<const int32_t*>(96), At<const int32_t*>(112),
                At<const int32_t*>(128), At<const int32_t*>(144), At<const int32_t*>(160),
                At<float>(224) * *At<const float*>(176) * *At<const float*>(192), *At<const float*>(208),
                At<uint32_t>(240), At<uint32_t>(256), At<uint32_t>(272), At<uint32_t>(288), causal, {}};
  if (!(kernel.scale > 0 && kernel.scale <= std::numeric_limits<float>::max())) return kBadScale;
  // what is not written holds anything
  std::memset(kernel.out, 0xFF, sizeof(uint16_t) * kernel.tokens * kernel.heads * kValues);
  std::memset(kernel.partial_out, 0xFF, sizeof(float) * facts.partial_rows * kernel.heads * kValues);
  std::memset(kernel.partial_lse, 0xFF, sizeof(float) * facts.partial_rows * kernel.heads);
  for (unsigned block = 0; block < facts.grid; ++block) {
    for (int w = kernel.work_indptr[block]; w < kernel.work_indptr[block + 1]; ++w) {
      if (Fault fault = RunRecord(kernel, kernel.work + 8 * w)) return fault;
    }
  }
  return kNone;
}

}  // namespace

extern "C" {

int hipGetDevice(int* device) {
  *device = 0;
  return kNone;
}

int hipModuleLoadData(void** module, const void* content) {
  const auto* bytes = static_cast<const unsigned char*>(content);
  uint64_t sections;
  uint16_t machine, size, count;
  std::memcpy(&machine, bytes + 18, 2);
  std::memcpy(&sections, bytes + 40, 8);
  std::memcpy(&size, bytes + 58, 2);
  std::memcpy(&count, bytes + 60, 2);
  if (std::memcmp(bytes, "\177ELF", 4) || machine != 224 || bytes[48] != 0x4F) return kNoObject;
  *module = new std::string(reinterpret_cast<const char*>(bytes), sections + uint64_t{size} * count);
  return kNone;
}

int hipModuleGetFunction(void** function, void* module, const char* symbol) {
  const std::string name(symbol);
  if (static_cast<std::string*>(module)->find(name + ".kd") == std::string::npos) return kNoSymbol;
  *function = new Function{name.find("causal1") != std::string::npos};
  return kNone;
}

int hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void*, void** parameters, void** extra) {
  const void* arguments = nullptr;
  size_t size = 0;
  for (; extra[0] != reinterpret_cast<void*>(3); extra += 2) {
    if (extra[0] == reinterpret_cast<void*>(1)) arguments = extra[1];
    if (extra[0] == reinterpret_cast<void*>(2)) size = *static_cast<size_t*>(extra[1]);
  }
  if (size != sizeof facts.arguments || !arguments || parameters) return kArguments;
  if (gy != 1 || gz != 1 || bx != 512 || by != 1 || bz != 1 || shared) return kGeometry;
  static std::mutex mutex;  // devices of the CPU share this runtime
  std::lock_guard<std::mutex> lock(mutex);
  std::memcpy(facts.arguments, arguments, size);
  facts.grid = gx;
  facts.block = bx;
  ++facts.launches;
  return Run(static_cast<Function*>(function)->causal);
}

const char* hipGetErrorString(int code) { return code > 0 && code < kFaults ? kText[code] : "unknown"; }

void fake_partial_rows(int64_t rows) { facts.partial_rows = rows; }

void fake_last(Facts* copy) { *copy = facts; }

}
