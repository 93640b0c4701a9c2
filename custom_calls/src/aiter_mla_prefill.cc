// XLA FFI handler that starts AITER's FP8 MLA prefill kernel for gfx950. Host code alone: it is built against the FFI
// headers of jaxlib and takes HIP from the runtime that the process has loaded, or from the library that the user names.

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using ffi::Error;
using ffi::ErrorCode;

constexpr int64_t kWidth = 192, kValues = 128, kTileRows = 256, kRecord = 8, kThreads = 512;

Error Refuse(ErrorCode code, const std::string& why) { return Error(code, "jax_fp8attn: " + why); }

// The functions of HIP that are called; pointers to its types are opaque here.
struct Hip {
  int (*get_device)(int*) = nullptr;
  int (*load_data)(void**, const void*) = nullptr;
  int (*get_function)(void**, void*, const char*) = nullptr;
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                void**) = nullptr;
  const char* (*error_string)(int) = nullptr;
};

void* OpenHip() {
  // the stream belongs to the runtime that jax has loaded
  for (const char* loaded : {"libamdhip64.so.7", "libamdhip64.so.6"}) {
    if (void* handle = dlopen(loaded, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return handle;
  }
  const char* named = std::getenv("JAX_FP8ATTN_HIP_LIBRARY");
  return named && *named ? dlopen(named, RTLD_NOW | RTLD_LOCAL) : nullptr;
}

template <class Function>
bool Find(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

// Empty, or why there is no HIP. A failure is tried again by the next call.
std::string LoadHip(const Hip*& result) {
  static std::mutex mutex;
  static Hip hip;
  static bool ready = false;
  std::lock_guard<std::mutex> lock(mutex);
  result = &hip;
  if (ready) return "";
  void* handle = OpenHip();
  if (!handle) {
    return "cannot dlopen libamdhip64: jax has loaded none, and JAX_FP8ATTN_HIP_LIBRARY names none that can be loaded";
  }
  ready = Find(handle, "hipGetDevice", hip.get_device) && Find(handle, "hipModuleLoadData", hip.load_data) &&
          Find(handle, "hipModuleGetFunction", hip.get_function) &&
          Find(handle, "hipModuleLaunchKernel", hip.launch) && Find(handle, "hipGetErrorString", hip.error_string);
  return ready ? "" : "the HIP runtime lacks a function that is needed (hipModuleLaunchKernel and its like)";
}

// Code objects that Python has checked, by their SHA-256, and their kernels, by device.
struct Store {
  std::mutex mutex;
  std::map<std::string, std::string, std::less<>> objects;
  std::map<std::tuple<std::string, std::string, int>, void*> kernels;
};

Store& store() {
  static Store* const kept = new Store;  // outlives every call at exit
  return *kept;
}

Error HipFailed(const Hip& hip, const char* what, int code) {
  return Refuse(ErrorCode::kInternal, std::string(what) + ": " + hip.error_string(code));
}

Error FindKernel(const Hip& hip, std::string_view hash, std::string_view symbol, void*& kernel) {
  int device = 0;
  if (int code = hip.get_device(&device)) return HipFailed(hip, "hipGetDevice", code);
  Store& kept = store();
  std::lock_guard<std::mutex> lock(kept.mutex);
  auto key = std::make_tuple(std::string(hash), std::string(symbol), device);
  if (auto known = kept.kernels.find(key); known != kept.kernels.end()) {
    kernel = known->second;
    return Error::Success();
  }
  auto object = kept.objects.find(hash);
  if (object == kept.objects.end()) {
    return Refuse(ErrorCode::kNotFound,
                  "this program was compiled for the AITER code object with SHA-256 " + std::string(hash) +
                      ", and this process has not loaded that one: the installed AITER may be another version");
  }
  void* module = nullptr;
  if (int code = hip.load_data(&module, object->second.data())) return HipFailed(hip, "hipModuleLoadData", code);
  if (int code = hip.get_function(&kernel, module, std::get<1>(key).c_str())) {
    return HipFailed(hip, "hipModuleGetFunction", code);
  }
  kept.kernels.emplace(std::move(key), kernel);
  return Error::Success();
}

// The kernel's arguments as the note of the code object lays them out: 16 bytes each.
template <class T>
struct alignas(16) Slot {
  T value;
};

struct Arguments {
  Slot<const void*> q, k, v;
  Slot<void*> out, partial_out, partial_lse;
  Slot<const void*> work_indptr, work, q_indptr, k_indptr, pages, q_scale, k_scale, v_scale;
  Slot<float> softmax_scale;
  Slot<uint32_t> tokens, heads, keys, used_keys;
};
static_assert(sizeof(Arguments) == 304 && offsetof(Arguments, work_indptr) == 96);
static_assert(offsetof(Arguments, q_scale) == 176 && offsetof(Arguments, softmax_scale) == 224);

using Codes = ffi::AnyBuffer;  // FP8 has no type of its own in a typed buffer
using Ints = ffi::Buffer<ffi::S32, 1>;
using Records = ffi::Buffer<ffi::S32, 2>;
using Scale = ffi::Buffer<ffi::F32, 1>;
using Out = ffi::ResultBuffer<ffi::BF16, 3>;
using PartialOut = ffi::ResultBuffer<ffi::F32, 3>;
using PartialLse = ffi::ResultBuffer<ffi::F32, 2>;

bool IsCodes(const Codes& x, int64_t rows, int64_t heads, int64_t width) {
  auto shape = x.dimensions();
  return x.element_type() == ffi::F8E4M3FN && shape.size() == 3 && shape[0] == rows && shape[1] == heads &&
         shape[2] == width;
}

Error CheckShapes(Codes q, Codes k, Codes v, Ints q_indptr, Ints k_indptr, Ints pages, Ints work_indptr, Records work,
                  Out out, PartialOut partial_out, PartialLse partial_lse) {
  if (q.dimensions().size() != 3 || k.dimensions().size() != 3) {
    return Refuse(ErrorCode::kInvalidArgument, "q and k must have three axes");
  }
  const int64_t tokens = q.dimensions()[0], heads = q.dimensions()[1], keys = k.dimensions()[0];
  const int64_t rows = partial_lse->dimensions()[0];
  if (!IsCodes(q, tokens, heads, kWidth) || !IsCodes(k, keys, heads, kWidth) || !IsCodes(v, keys, heads, kValues)) {
    return Refuse(ErrorCode::kInvalidArgument,
                  "q, k and v must be float8_e4m3fn of [T, H, 192], [S, H, 192] and [S, H, 128]");
  }
  auto is = [](auto shape, int64_t a, int64_t b, int64_t c) { return shape[0] == a && shape[1] == b && shape[2] == c; };
  bool fits = is(out->dimensions(), tokens, heads, kValues) && is(partial_out->dimensions(), rows, heads, kValues);
  fits = fits && partial_lse->dimensions()[1] == heads && rows % kTileRows == 0;
  fits = fits && q_indptr.dimensions()[0] == k_indptr.dimensions()[0] && q_indptr.dimensions()[0] > 0;
  fits = fits && pages.dimensions()[0] == keys && work_indptr.dimensions()[0] > 0 && work.dimensions()[1] == kRecord;
  return fits ? Error::Success() : Refuse(ErrorCode::kInvalidArgument, "the plan or the results have a wrong shape");
}

// What the kernel's 32-bit offsets and its 24-bit multiply of page numbers can reach. It stores nothing past a limit
// and reports nothing.
Error CheckLimits(int64_t tokens, int64_t keys, int64_t heads, int64_t partial_rows) {
  constexpr int64_t k24 = int64_t{1} << 24, k31 = int64_t{1} << 31, k32 = int64_t{1} << 32;
  const char* broken = nullptr;
  if (tokens * heads * kValues * 2 >= k32) broken = "the output must have less than 2^32 bytes";
  if (keys * heads * kWidth >= k32) broken = "k must have less than 2^32 bytes";
  if (keys >= k24) broken = "there must be less than 2^24 keys";
  if (partial_rows * heads * kValues * 4 > k31) broken = "partial results must have at most 2^31 bytes";
  return broken ? Refuse(ErrorCode::kInvalidArgument, broken) : Error::Success();
}

Error Launch(void* stream, Codes q, Codes k, Codes v, Ints q_indptr, Ints k_indptr, Ints pages, Ints work_indptr,
             Records work, Scale q_scale, Scale k_scale, Scale v_scale, Out out, PartialOut partial_out,
             PartialLse partial_lse, std::string_view code_object, std::string_view symbol) {
  if (Error wrong = CheckShapes(q, k, v, q_indptr, k_indptr, pages, work_indptr, work, out, partial_out, partial_lse);
      wrong.failure()) {
    return wrong;
  }
  const int64_t tokens = q.dimensions()[0], heads = q.dimensions()[1], keys = k.dimensions()[0];
  if (Error wrong = CheckLimits(tokens, keys, heads, partial_lse->dimensions()[0]); wrong.failure()) return wrong;
  for (const Scale& scale : {q_scale, k_scale, v_scale}) {
    if (scale.dimensions()[0] != 1 || !scale.untyped_data()) {
      return Refuse(ErrorCode::kInvalidArgument, "a scale must be one float32: the kernel reads it unasked");
    }
  }
  const unsigned blocks = static_cast<unsigned>(work_indptr.dimensions()[0] - 1);
  if (!tokens || !heads || !keys || !blocks) return Error::Success();

  const Hip* hip = nullptr;
  if (std::string why = LoadHip(hip); !why.empty()) return Refuse(ErrorCode::kFailedPrecondition, why);
  void* kernel = nullptr;
  if (Error wrong = FindKernel(*hip, code_object, symbol, kernel); wrong.failure()) return wrong;

  Arguments arguments;
  std::memset(&arguments, 0, sizeof arguments);
  arguments.q.value = q.untyped_data();
  arguments.k.value = k.untyped_data();
  arguments.v.value = v.untyped_data();
  arguments.out.value = out->untyped_data();
  arguments.partial_out.value = partial_out->untyped_data();
  arguments.partial_lse.value = partial_lse->untyped_data();
  arguments.work_indptr.value = work_indptr.untyped_data();
  arguments.work.value = work.untyped_data();
  arguments.q_indptr.value = q_indptr.untyped_data();
  arguments.k_indptr.value = k_indptr.untyped_data();
  arguments.pages.value = pages.untyped_data();
  arguments.q_scale.value = q_scale.untyped_data();
  arguments.k_scale.value = k_scale.untyped_data();
  arguments.v_scale.value = v_scale.untyped_data();
  arguments.softmax_scale.value = 1.0f;  // q_scale holds it, so that it may be traced
  arguments.tokens.value = static_cast<uint32_t>(tokens);
  arguments.heads.value = static_cast<uint32_t>(heads);
  arguments.keys.value = static_cast<uint32_t>(keys);
  arguments.used_keys.value = static_cast<uint32_t>(pages.dimensions()[0]);

  size_t size = sizeof arguments;
  void* const pointer_follows = reinterpret_cast<void*>(1);  // HIP_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END
  void* const size_follows = reinterpret_cast<void*>(2);
  void* const end = reinterpret_cast<void*>(3);
  void* extra[] = {pointer_follows, &arguments, size_follows, &size, end};
  if (int code = hip->launch(kernel, blocks, 1, 1, kThreads, 1, 1, 0, stream, nullptr, extra)) {
    return HipFailed(*hip, "hipModuleLaunchKernel", code);
  }
  return Error::Success();
}

// Modules are loaded before the first launch, never while a graph is captured.
Error Prepare(std::string_view code_object, std::string_view symbol) {
  const Hip* hip = nullptr;
  if (std::string why = LoadHip(hip); !why.empty()) return Refuse(ErrorCode::kFailedPrecondition, why);
  void* kernel = nullptr;
  return FindKernel(*hip, code_object, symbol, kernel);
}

// The same without a stream, for a HIP runtime that stands in for a GPU on the CPU.
Error LaunchOnHost(Codes q, Codes k, Codes v, Ints q_indptr, Ints k_indptr, Ints pages, Ints work_indptr, Records work,
                   Scale q_scale, Scale k_scale, Scale v_scale, Out out, PartialOut partial_out,
                   PartialLse partial_lse, std::string_view code_object, std::string_view symbol) {
  return Launch(nullptr, q, k, v, q_indptr, k_indptr, pages, work_indptr, work, q_scale, k_scale, v_scale, out,
                partial_out, partial_lse, code_object, symbol);
}

template <class Binding>
auto WithArguments(Binding binding) {
  return std::move(binding)
      .template Arg<Codes>().template Arg<Codes>().template Arg<Codes>()
      .template Arg<Ints>().template Arg<Ints>().template Arg<Ints>().template Arg<Ints>().template Arg<Records>()
      .template Arg<Scale>().template Arg<Scale>().template Arg<Scale>()
      .template Ret<ffi::Buffer<ffi::BF16, 3>>()
      .template Ret<ffi::Buffer<ffi::F32, 3>>().template Ret<ffi::Buffer<ffi::F32, 2>>()
      .template Attr<std::string_view>("code_object").template Attr<std::string_view>("symbol");
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFp8attnAiterLaunch, Launch,
                              WithArguments(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFp8attnAiterLaunchOnHost, LaunchOnHost, WithArguments(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFp8attnAiterPrepare, Prepare,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                                  .Attr<std::string_view>("code_object")
                                  .Attr<std::string_view>("symbol"));

extern "C" void JaxFp8attnAiterAddCodeObject(const char* hash, const char* content, size_t size) {
  Store& kept = store();
  std::lock_guard<std::mutex> lock(kept.mutex);
  kept.objects.emplace(hash, std::string(content, size));
}

// Copies why there is no HIP runtime into ``text``, nothing if there is one.
extern "C" void JaxFp8attnAiterWhyNoHip(char* text, size_t size) {
  const Hip* hip = nullptr;
  std::string why = LoadHip(hip);
  if (size) text[why.copy(text, size - 1)] = '\0';
}

#pragma GCC visibility pop
