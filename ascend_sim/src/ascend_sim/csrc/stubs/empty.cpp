// SPDX-License-Identifier: Apache-2.0
// Libraries that torch_npu is linked with, and of which it needs nothing but that they are there:
// libge_runner, libgraph, libacl_tdt_channel.
