# Sets `result` to the compute capabilities of this machine's GPUs, such as "80;90", as the driver reports them. Empty if
# it has none.
function(onepass_gpus result)
  set(${result} "" PARENT_SCOPE)
  find_program(nvidia_smi nvidia-smi NO_CACHE)
  if(NOT nvidia_smi)
    return()
  endif()
  execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE reported RESULT_VARIABLE failed ERROR_QUIET TIMEOUT 10)
  if(failed)
    return()
  endif()
  string(REGEX MATCHALL "[0-9]+[.][0-9]" found "${reported}")
  list(TRANSFORM found REPLACE "[.]" "")
  list(REMOVE_DUPLICATES found)
  list(SORT found COMPARE NATURAL)
  set(${result} "${found}" PARENT_SCOPE)
endfunction()
