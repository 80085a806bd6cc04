// SPDX-License-Identifier: Apache-2.0
// libhccl: collectives aren't simulated. torch_npu sets an option of theirs when it starts.
extern "C" __attribute__((visibility("default"))) int HcclSetConfig(int, long) { return 0; }
