# pybind11 and dlpack.h, from the packages of the Python that builds. Both are build dependencies;
# without build isolation they are what is installed. They are copied to the build folder where they
# differ: with isolation each build has them elsewhere, and everything would be compiled anew.

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
  ranger_ask_python(pybind11_root "import pybind11, os; print(os.path.dirname(pybind11.__file__))")
  if(EXISTS "${pybind11_root}/share/cmake/pybind11")
    set(pybind11_copy "${CMAKE_CURRENT_BINARY_DIR}/pybind11")
    file(GLOB_RECURSE pybind11_files RELATIVE "${pybind11_root}"
      "${pybind11_root}/include/*" "${pybind11_root}/share/*")
    foreach(file IN LISTS pybind11_files)
      configure_file("${pybind11_root}/${file}" "${pybind11_copy}/${file}" COPYONLY)
    endforeach()
    set(pybind11_DIR "${pybind11_copy}/share/cmake/pybind11")
  endif()
  set(PYBIND11_FINDPYTHON ON)
  find_package(pybind11 CONFIG)
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
          configure_file("${folder}/${header}" "${CMAKE_CURRENT_BINARY_DIR}/dlpack/dlpack.h" COPYONLY)
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
