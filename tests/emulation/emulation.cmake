# csrc/cuda/ compiled as C++ over emulated_runtime.h. Few threads and small chunks, so that small
# tensors have many blocks and every block has packs and single elements, and the smallest arguments,
# so that few tensors have many launches of the schedule.
set(RANGER_EMULATION_DIR ${CMAKE_CURRENT_LIST_DIR})

function(ranger_emulate_cuda target)
  set(launch ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/launch.cu)
  set_source_files_properties(${launch} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  target_sources(${target} PRIVATE ${launch} ${RANGER_EMULATION_DIR}/emulated_device.cpp)
  target_include_directories(${target} PRIVATE ${RANGER_EMULATION_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  target_compile_definitions(${target} PRIVATE RANGER_EMULATE_CUDA
    RANGER_CUDA_THREADS=4 RANGER_CUDA_CHUNK=64 RANGER_CUDA_TIER=0)
  find_package(Threads REQUIRED)
  target_link_libraries(${target} PRIVATE Threads::Threads)
endfunction()
