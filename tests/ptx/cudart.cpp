// Stands in for libcudart under the objects that nvcc makes: the device is this CPU, streams are
// done at once, and a launch runs the translated kernel of its name (runtime.cpp).
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

extern "C" {
const void* ptx_find(const void* module, const char* name);
const char* ptx_launch(const void* kernel, uint32_t blocks, uint32_t threads, void** arguments);
void ptx_allow(uint64_t begin, uint64_t size);
void ptx_forbid(uint64_t begin);
extern int ptx_driver_version;
}

namespace {

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_host_functions;
  return of_host_functions;
}

cudaError_t last_error = cudaSuccess;
std::string last_fault;

const void* find(const void* function) {
  const auto name = names().find(function);
  return name == names().end() ? nullptr : ptx_find(nullptr, name->second.c_str());
}

bool is_flat(const dim3& size) { return size.y == 1 && size.z == 1; }

}  // namespace

extern "C" {

// --- what the objects say of their kernels before main()
// -------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

// --- launches; those with <<< >>> come in three parts, which nothing here uses
// -------------------------

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const void* const kernel = find(function);
  if (kernel == nullptr) return last_error = cudaErrorNoKernelImageForDevice;
  if (!is_flat(grid) || !is_flat(block) || shared != 0 || grid.x > 0x7fffffffu) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  const char* const fault = ptx_launch(kernel, grid.x, block.x, arguments);
  if (fault == nullptr) return cudaSuccess;
  last_fault = fault;
  return last_error = cudaErrorIllegalAddress;
}

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  std::memset(attributes, 0, sizeof(*attributes));
  return find(function) != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

// --- memory ------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** memory, size_t size) {
  constexpr size_t kAlignment = 256;
  *memory = nullptr;
  if (size == 0) return cudaSuccess;
  *memory = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
  std::memset(*memory, 0xff, size);  // nothing may count on zeros
  ptx_allow(reinterpret_cast<uint64_t>(*memory), size);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  ptx_forbid(reinterpret_cast<uint64_t>(memory));
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

// --- streams and captures, of which there are none
// ---------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t, cudaStreamCaptureStatus* status,
                                        unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                                        size_t*) {
#endif
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t*, void*, cudaHostFn_t, unsigned, unsigned) {
  return cudaErrorNotSupported;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaErrorNotSupported; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return cudaErrorNotSupported;
}

// --- the device and the driver
// ---------------------------------------------------------------------

// The driver's functions: one device, whose context is current to a thread while it is needed.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int,
                                             unsigned long long, cudaDriverEntryPointQueryResult*) {
  static int device_context = 0;
  static thread_local void* current = nullptr;
  static const std::map<std::string, void*> functions = {
      {"cuCtxGetCurrent", reinterpret_cast<void*>(+[](void** context) {
         *context = current;
         return 0;
       })},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(+[](void* context) {
         current = context;
         return 0;
       })},
      {"cuCtxGetDevice", reinterpret_cast<void*>(+[](int* device) { return *device = 0; })},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(+[](void** context, int) {
         *context = &device_context;
         return 0;
       })},
      {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(+[](int) { return 0; })}};
  *function = functions.at(name);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {  // _v2 before CUDA 13
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "this CPU, running PTX");
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = ptx_driver_version;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? last_fault.c_str() : "the stand-in says no";
}
const char* cudaGetErrorName(cudaError_t) { return "of the stand-in"; }

}  // extern "C"
