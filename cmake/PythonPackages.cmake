# pybind11 and dlpack.h, from the packages of the Python that builds. Both are build dependencies;
# without build isolation they are what is installed.

# Sets ${result} to what a line of Python prints, or to "" if it fails.
function(ranger_ask_python result code)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${code}"
    OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    set(answer "")
  endif()
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

macro(ranger_find_pybind11)
  ranger_ask_python(pybind11_dir "import pybind11; print(pybind11.get_cmake_dir())")
  set(PYBIND11_FINDPYTHON ON)
  find_package(pybind11 CONFIG HINTS "${pybind11_dir}")
  if(NOT pybind11_FOUND)
    message(FATAL_ERROR "pybind11 was not found: pip install pybind11")
  endif()
endmacro()

# Sets DLPACK_INCLUDE_DIR to a folder that holds dlpack/dlpack.h with the C exchange API (>= 1.2).
function(ranger_find_dlpack)
  foreach(code
      "import tvm_ffi.libinfo as i; print(i.find_dlpack_include_path())"
      "import importlib.util as u, os; print(os.path.join(os.path.dirname(u.find_spec('tvm_ffi').origin), 'include'))"
      "import importlib.util as u, os; print(os.path.join(os.path.dirname(u.find_spec('torch').origin), 'include'))")
    ranger_ask_python(folder "${code}")
    foreach(header dlpack/dlpack.h ATen/dlpack.h)
      if(folder AND EXISTS "${folder}/${header}")
        file(STRINGS "${folder}/${header}" exchange_api REGEX "struct DLPackExchangeAPI")
        if(exchange_api)
          # torch keeps the header under another name; include it as <dlpack/dlpack.h> all the same.
          file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/dlpack/dlpack.h"
            "#include \"${folder}/${header}\"\n")
          set(DLPACK_INCLUDE_DIR "${CMAKE_CURRENT_BINARY_DIR}" PARENT_SCOPE)
          message(STATUS "dlpack.h: ${folder}/${header}")
          return()
        endif()
      endif()
    endforeach()
  endforeach()
  message(FATAL_ERROR "No dlpack.h with the C exchange API was found: "
    "pip install apache-tvm-ffi, or install torch >= 2.10.")
endfunction()
