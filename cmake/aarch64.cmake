# A toolchain file: builds for aarch64 with Debian's cross compiler (g++-aarch64-linux-gnu), and runs the C++ tests under
# an emulator (qemu-user).
#
#     cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake -DONEPASS_PYTHON=OFF -DONEPASS_TESTS=ON \
#       -DONEPASS_DOCTEST=FOLDER
#
# FOLDER has doctest/doctest.h and no headers of this machine, as /usr/include has.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
