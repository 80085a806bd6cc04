# SPDX-License-Identifier: Apache-2.0
"""Numbers and option keys of the module ``hixl``, and its limits."""

from __future__ import annotations

SUCCESS = 0
PARAM_INVALID = 103900
TIMEOUT = 103901
NOT_CONNECTED = 103902
ALREADY_CONNECTED = 103903
NOTIFY_FAILED = 103904
UNSUPPORTED = 103905
FAILED = 503900
RESOURCE_EXHAUSTED = 203900

FEATURE_NOT_SUPPORTED = 0
FEATURE_SUPPORTED = 1

OPTION_ENABLE_USE_FABRIC_MEM = "EnableUseFabricMem"
OPTION_RDMA_TRAFFIC_CLASS = "RdmaTrafficClass"
OPTION_RDMA_SERVICE_LEVEL = "RdmaServiceLevel"
OPTION_BUFFER_POOL = "BufferPool"
OPTION_GLOBAL_RESOURCE_CONFIG = "GlobalResourceConfig"
OPTION_AUTO_CONNECT = "AutoConnect"
OPTION_LOCAL_COMM_RES = "LocalCommRes"

MAX_LINKS = 512
"""Links of an engine, unless LocalCommRes is of version 1.3."""

MAX_NOTIFY_CHARACTERS = 1024
MAX_UNREAD_NOTIFIES = 4096
"""Per link."""

MAX_REQUESTS = 128
"""Asynchronous transfers under way per engine: a stand-in for the streams of a device."""

ALIGNMENT = 2 << 20
"""What HCCS wants of the start of device memory that is not from aclrtMalloc."""
