#include "runtime.h"

#include <cuda.h>

#include <mutex>
#include <utility>
#include <vector>

namespace ranger::cuda {
namespace {

// While a stream is captured, allocating is an error in any thread of the process that does not say
// that it means no stream.
class OutsideOfCapture {
 public:
  OutsideOfCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideOfCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// What graphs have let go of. They do so where no call of CUDA is allowed, so it is freed later.
std::mutex released_mutex;
std::vector<std::shared_ptr<const void>>& released() {
  static auto* const list = new std::vector<std::shared_ptr<const void>>;
  return *list;
}

void CUDART_CB release(void* holder) {
  auto* const tables = static_cast<std::shared_ptr<const void>*>(holder);
  const std::lock_guard<std::mutex> lock(released_mutex);
  released().push_back(std::move(*tables));
  delete tables;
}

void free_released() {
  std::vector<std::shared_ptr<const void>> list;
  const std::lock_guard<std::mutex> lock(released_mutex);
  list.swap(released());
}

// The driver's functions, found without linking it, so that the module loads where there is none.
template <class Function>
Function* entry_point(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  if (found == nullptr) throw Error(std::string("the driver has no ") + name);
  return reinterpret_cast<Function*>(found);
}

struct Entries {
  CUresult (*get_current)(CUcontext*) = entry_point<CUresult(CUcontext*)>("cuCtxGetCurrent");
  CUresult (*set_current)(CUcontext) = entry_point<CUresult(CUcontext)>("cuCtxSetCurrent");
  CUresult (*get_device)(CUdevice*) = entry_point<CUresult(CUdevice*)>("cuCtxGetDevice");
  CUresult (*retain)(CUcontext*, CUdevice) =
      entry_point<CUresult(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain");
  CUresult (*release)(CUdevice) = entry_point<CUresult(CUdevice)>("cuDevicePrimaryCtxRelease");
};

const Entries& entries() {
  static const Entries found;
  return found;
}

// The driver's errors have the runtime's numbers.
void check_driver(CUresult error, const char* call) {
  check(static_cast<cudaError_t>(error), call);
}

}  // namespace

std::string describe_error(const char* call, cudaError_t error) {
  return std::string(call) + ": " + cudaGetErrorString(error) + " (error " +
         std::to_string(static_cast<int>(error)) + ", " + cudaGetErrorName(error) + ")";
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here; the next caller's check is not to find it again
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(describe_error(call, error));
  throw Error(describe_error(call, error));
}

void* Driver::current() {
  CUcontext context = nullptr;
  check_driver(entries().get_current(&context), "cuCtxGetCurrent");
  return context;
}

int32_t Driver::device() {
  CUdevice device = 0;
  check_driver(entries().get_device(&device), "cuCtxGetDevice");
  return device;
}

void Driver::enter(int32_t device) {
  CUcontext context = nullptr;
  check_driver(entries().retain(&context, device), "cuDevicePrimaryCtxRetain");
  const CUresult error = entries().set_current(context);
  if (error != CUDA_SUCCESS) entries().release(device);
  check_driver(error, "cuCtxSetCurrent");
}

void Driver::leave(int32_t device, void* before) noexcept {
  entries().set_current(static_cast<CUcontext>(before));
  entries().release(device);
}

DeviceMemory::DeviceMemory(size_t size) {
  free_released();
  const OutsideOfCapture outside;
  check(cudaMalloc(&memory_, size), "cudaMalloc");
}

DeviceMemory::~DeviceMemory() {
  if (memory_ == nullptr) return;
  const OutsideOfCapture outside;
  cudaFree(memory_);  // fails only where the driver is gone already, at the end of the process
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(memory_, other.memory_);
  return *this;
}

void DeviceMemory::fill_from(const void* host, size_t size) const {
  const OutsideOfCapture outside;
  cudaStream_t stream = nullptr;  // the user's may be in a capture, which would record the copy
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaError_t error = cudaMemcpyAsync(memory_, host, size, cudaMemcpyHostToDevice, stream);
  const char* call = "cudaMemcpyAsync";
  if (error == cudaSuccess) {
    error = cudaStreamSynchronize(stream);
    call = "cudaStreamSynchronize";
  }
  cudaStreamDestroy(stream);
  check(error, call);
}

void keep_while_captured(void* stream, const std::shared_ptr<const void>& tables) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  const auto handle = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(handle, &status, &id, &graph, nullptr, nullptr, nullptr),
        "cudaStreamGetCaptureInfo");
#else
  check(cudaStreamGetCaptureInfo_v2(handle, &status, &id, &graph, nullptr, nullptr),
        "cudaStreamGetCaptureInfo_v2");
#endif
  if (status != cudaStreamCaptureStatusActive) return;
  auto* const holder = new std::shared_ptr<const void>(tables);
  cudaUserObject_t object = nullptr;
  const cudaError_t error =
      cudaUserObjectCreate(&object, holder, release, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) delete holder;
  check(error, "cudaUserObjectCreate");
  const cudaError_t retained = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (retained != cudaSuccess) cudaUserObjectRelease(object, 1);
  check(retained, "cudaGraphRetainUserObject");
}

int32_t largest_tier() {
#if CUDART_VERSION >= 12010
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver >= 12010) return static_cast<int32_t>(std::size(kScheduleTiers)) - 1;
#endif
  return kTierOf4KiB;
}

}  // namespace ranger::cuda
