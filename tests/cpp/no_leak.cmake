# Checks the object file of one instruction set against csrc/target.h: every symbol that the linker could merge with
# another object's is in namespace onepass::<isa>, and no code runs before dispatch.
#
#   cmake -DNM=nm -DISA=avx2 -DOBJECT=kernels.cpp.o -P no_leak.cmake

execute_process(COMMAND ${NM} --defined-only ${OBJECT} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
string(LENGTH ${ISA} length)
set(namespace "7onepass${length}${ISA}")  # in mangled names, after N or, of const members, NK

if(NOT output MATCHES "_ZN${namespace}14narrow_kernelsE")
  message(FATAL_ERROR "${OBJECT} does not define the kernels of onepass::${ISA}")
endif()

string(REGEX MATCHALL "[^\n]+" lines "${output}")
set(faults "")
foreach(line IN LISTS lines)
  if(NOT line MATCHES "^[0-9a-f]+ ([A-Za-z]) (.+)$")
    message(FATAL_ERROR "unexpected line of nm: ${line}")
  endif()
  set(type ${CMAKE_MATCH_1})
  set(symbol ${CMAKE_MATCH_2})
  if(type MATCHES "[A-Zuvw]" AND NOT symbol MATCHES "NK?${namespace}")  # global, weak or unique
    string(APPEND faults "\n  outside of onepass::${ISA}: ${symbol}")
  endif()
  if(symbol MATCHES "^_GLOBAL__sub_|static_initialization_and_destruction")
    string(APPEND faults "\n  runs before dispatch: ${symbol}")
  endif()
endforeach()
if(faults)
  message(FATAL_ERROR "${OBJECT}:${faults}")
endif()
