# SPDX-License-Identifier: Apache-2.0
"""Device memory between processes of one host, by AscendCL's keys for allocations (IPC)."""
