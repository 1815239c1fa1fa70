# Finds nvcc and says which architectures it shall compile for, or what is wrong and what to set.
# Everything is checked before CMake's own tests of the compiler, whose messages say less.

if(NOT CMAKE_CUDA_COMPILER)
  if(DEFINED ENV{CUDACXX})
    find_program(NVCC "$ENV{CUDACXX}" NO_CACHE)
  else()
    find_program(NVCC nvcc NO_CACHE HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
                 PATH_SUFFIXES bin)
  endif()
  if(NOT NVCC)
    message(FATAL_ERROR "nvcc was not found: install the CUDA toolkit, or set CUDACXX to its nvcc")
  endif()
  set(CMAKE_CUDA_COMPILER "${NVCC}")
endif()

function(ask_nvcc option pattern result)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" "${option}" OUTPUT_VARIABLE output
                  ERROR_VARIABLE output RESULT_VARIABLE failed)
  string(REGEX MATCHALL "${pattern}" found "${output}")
  if(failed OR NOT found)
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} ${option} failed, so that nvcc is broken: set "
                        "CUDACXX to one that works")
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

ask_nvcc(--version "V[0-9]+\\.[0-9]+" nvcc_version)
string(SUBSTRING "${nvcc_version}" 1 -1 nvcc_version)
string(REGEX MATCH "^[0-9]+" nvcc_major "${nvcc_version}")
string(REGEX MATCH "^[0-9]+" torch_major "${GN_KERNELS_TORCH_CUDA}")
if(torch_major AND NOT torch_major EQUAL nvcc_major)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is of CUDA ${nvcc_version}, but torch was built for "
                      "CUDA ${GN_KERNELS_TORCH_CUDA}: set CUDACXX to an nvcc of CUDA ${torch_major}")
endif()

# --- Architectures, 80 for sm_80, and those of which the PTX is kept, for later GPUs --------------

ask_nvcc(--list-gpu-code "sm_[0-9]+" known)
list(TRANSFORM known REPLACE "sm_" "")
set(oldest 80)  # the first with bf16 conversions

if(TORCH_CUDA_ARCH_LIST)
  string(REGEX REPLACE "[ ,]+" ";" wanted "${TORCH_CUDA_ARCH_LIST}")
  set(Ampere "8.0;8.6+PTX")
  set(Ada "8.9+PTX")
  set(Hopper "9.0+PTX")
  set(Blackwell "10.0;12.0+PTX")
  list(TRANSFORM wanted REPLACE "^(Ampere|Ada|Hopper|Blackwell)$" "\${\\1}")
  string(CONFIGURE "${wanted}" wanted)
else()
  # One build for the GPUs of data centres; their minor relatives run it too, later ones its PTX.
  set(wanted)
  foreach(one IN ITEMS 80 90 100)
    if(one IN_LIST known)
      list(APPEND wanted ${one})
    endif()
  endforeach()
  list(TRANSFORM wanted REPLACE "(.)$" ".\\1")
  list(JOIN wanted ";" wanted)
  string(APPEND wanted "+PTX")
endif()

set(CMAKE_CUDA_ARCHITECTURES)
set(CUDA_ARCHITECTURES_TEXT)
foreach(one IN LISTS wanted)
  if(NOT one MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST names '${one}', which is no architecture: set it to "
                        "compute capabilities, such as \"8.0;9.0+PTX\"")
  endif()
  set(arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  set(ptx "${CMAKE_MATCH_3}")
  string(REGEX MATCH "^[0-9]+" number "${arch}")
  if(number LESS oldest)
    message(STATUS "Left out of TORCH_CUDA_ARCH_LIST: ${one}, which is older than 8.0")
  elseif(NOT number IN_LIST known)
    list(TRANSFORM known REPLACE "(.)$" ".\\1")
    list(JOIN known ", " known)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST names ${one}, which ${CMAKE_CUDA_COMPILER} (CUDA "
                        "${nvcc_version}) does not know; it knows ${known}")
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
    if(ptx)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-virtual)
    endif()
    string(APPEND CUDA_ARCHITECTURES_TEXT " sm_${arch}${ptx}")
  endif()
endforeach()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST} names nothing from 8.0 on, and "
                      "the CUDA kernels need that: set it to \"8.0+PTX\" or above")
endif()
list(REMOVE_DUPLICATES CMAKE_CUDA_ARCHITECTURES)
string(STRIP "${CUDA_ARCHITECTURES_TEXT}" CUDA_ARCHITECTURES_TEXT)

# Such as an nvcc that does not take the host's compiler: it says so itself.
set(trial "${CMAKE_BINARY_DIR}/trial")
file(WRITE "${trial}.cu" "__global__ void kernel() {}\n")
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" -c "${trial}.cu" -o "${trial}.o"
                OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
if(failed)
  string(REGEX MATCH "[^\n]*(error|fatal|broken|not supported)[^\n]*" output "${output}")
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} can't compile: ${output}; set CUDACXX to an nvcc that "
                      "works, or NVCC_CCBIN to a host compiler that it takes")
endif()

set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
