// What ctypes sees of the library: plain C, so that one file serves every version of Python and torch.
//
// The version is raised with each change of what is exported or of a struct's layout; library.py asks for it first.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t moeflow_version() { return 1; }
