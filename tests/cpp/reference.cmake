# The library that the C++ tests and the benchmark of the kernels share: problems, and the reference of a step.
include_guard(GLOBAL)

add_library(onepass_reference STATIC ${CMAKE_CURRENT_LIST_DIR}/reference.cpp)
target_include_directories(onepass_reference PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_compile_options(onepass_reference PRIVATE ${ONEPASS_WARNINGS} -Wno-missing-field-initializers ${ONEPASS_MATH})
target_link_libraries(onepass_reference PUBLIC onepass_core OpenMP::OpenMP_CXX)
if(ONEPASS_SANITIZE)
  # It is not what is tested, and instrumented it would take most of the tests' time.
  target_compile_options(onepass_reference PRIVATE -fno-sanitize=all -O2)
endif()
if(ONEPASS_SANITIZE MATCHES "address")
  target_compile_definitions(onepass_reference PUBLIC ONEPASS_ADDRESS_SANITIZER)
endif()
